"""The pass over the training set sees what training sees: precision, hooks, each sample once."""

import pytest
import torch
from support.points import Points, normal_points
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_vr import (
    STF,
    Clean,
    DiffusionModule,
    FrechetDistance,
    ResidualMLP,
    SampleGrid,
    Sampler,
    TargetVariance,
)
from lightning_vr.process.timesteps import LogUniform

COUNT = 32
POINTS = 128 + 40 * normal_points(COUNT, "points of a pass")
DATA = Points(POINTS)


def module(kind=DiffusionModule, **slots):
    return kind(ResidualMLP(2, width=8, depth=1), timesteps=LogUniform(0.05, 50.0), **slots)


def fit(model, *callbacks, loader=None, **options):
    trainer = quiet_trainer(*callbacks, max_epochs=1, num_sanity_val_steps=0, **options)
    loader = loader or DataLoader(DATA, batch_size=8)
    trainer.fit(model, loader, DataLoader(DATA, batch_size=8))
    return trainer


class Standardised(DiffusionModule):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch | {"x0": (batch["x0"] - 128) / 40}


@pytest.mark.usefixtures("no_pictures")
def test_what_a_hook_does_to_batches_is_done_to_the_bank(tmp_path):
    curves = TargetVariance(noise_levels=3, samples=64)
    model = module(Standardised, target=STF("all"))
    fit(model, curves, default_root_dir=tmp_path)
    bank = model.target.bank
    torch.testing.assert_close(bank.rows + bank.centre, (POINTS - 128) / 40)
    assert torch.equal(model.estimate.noised.x0, ((POINTS - 128) / 40)[-8:])
    # high above the data V_DSM is the variance of the data over s⁴
    highest = curves.curve.dsm.mean[-1] * curves.curve.noise_levels[-1] ** 4
    assert float(highest) == pytest.approx(float(((POINTS - 128) / 40).var(0).sum()), rel=0.2)


class Latent(DiffusionModule):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.vae = nn.Linear(2, 2).requires_grad_(False)

    def encode(self, batch):
        return Clean(self.vae(batch["x0"]), index=batch["index"])

    def decode(self, x0):
        return self.vae(x0.to(self.vae.weight.dtype))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("reader", ["all", "calibration", "variance", "distance", "grid"])
def test_an_upstream_gets_batches_in_the_precision_of_its_weights(reader, precision, tmp_path):
    targets = {"all": STF("all"), "calibration": STF("batch", min_noise_level="auto")}
    callbacks = {
        "variance": TargetVariance(noise_levels=3, samples=64),
        "distance": FrechetDistance(samples=20),
        "grid": SampleGrid(samples=2),
    }
    chosen = [callbacks[reader]] if reader in callbacks else []
    model = module(Latent, target=targets.get(reader), sampler=Sampler(steps=2))
    if precision == "bf16-mixed":
        model.vae.to(torch.bfloat16)
    trainer = fit(model, *chosen, precision=precision, default_root_dir=tmp_path)
    assert trainer.global_step == COUNT // 8


class Opened(Points):
    """Points that a worker has to open first."""

    is_open = False

    def __getitem__(self, i):
        assert self.is_open
        return super().__getitem__(i)


def open_points(worker):
    get_worker_info().dataset.is_open = True


def test_workers_start_as_those_of_the_training_loader_do():
    loader = DataLoader(Opened(POINTS), batch_size=8, num_workers=1, worker_init_fn=open_points)
    model = module(target=STF("all"))
    fit(model, loader=loader, limit_val_batches=0)
    assert len(model.target.bank) == COUNT


def weighted():
    return WeightedRandomSampler([9.0] * 16 + [1.0] * 16, COUNT)


UNEQUAL = {
    "SubsetRandomSampler": lambda: DataLoader(
        DATA, batch_size=8, sampler=SubsetRandomSampler(range(16))
    ),
    "WeightedRandomSampler": lambda: DataLoader(DATA, batch_size=8, sampler=weighted()),
    "WeightedRandomSampler in batches": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(weighted(), 8, drop_last=False)
    ),
}


@pytest.mark.parametrize("references", ["all", 4])
@pytest.mark.parametrize("kind", UNEQUAL)
def test_a_bank_of_samples_that_do_not_come_equally_often_is_refused(kind, references):
    name = kind.split()[0]
    with pytest.raises(ValueError, match=rf"loader with a {name}.*Subset, or use ref"):
        fit(module(target=STF(references)), loader=UNEQUAL[kind]())


def test_a_bank_of_more_than_a_run_overfits_is_refused():
    with pytest.raises(ValueError, match="`overfit_batches` must be 0"):
        fit(module(target=STF("all")), overfit_batches=1)


EQUAL = {
    "shuffled": lambda: DataLoader(DATA, batch_size=8, shuffle=True),
    "batches": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, drop_last=True)
    ),
    "without a bank": UNEQUAL["WeightedRandomSampler"],
}


@pytest.mark.parametrize("kind", EQUAL)
def test_samples_that_come_equally_often_and_targets_without_a_bank_are_not_refused(kind):
    target = STF("batch" if kind == "without a bank" else "all")
    assert fit(module(target=target), loader=EQUAL[kind]()).global_step == COUNT // 8
