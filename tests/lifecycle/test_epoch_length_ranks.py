"""Ranks with differently many or differently large batches, and a sample that is not finite on one.

Nothing hangs: a test that did would run into the time limit of its process group.
"""

import itertools
import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.strategies import DDPStrategy
from support.networks import small_mlp
from support.points import Points, normal_points
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_vr import CARV, STF, DiffusionModule, GradientVariance, TaylorCV
from lightning_vr.callbacks import cadence
from lightning_vr.core.distributed import rank
from lightning_vr.core.types import Noised
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.training.resamples_pilot import ResamplesPilot
from lightning_vr.variance.gradient_measurement import GradientMeasurement

pytestmark = [
    pytest.mark.usefixtures("no_pictures_in_module"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

# Sums of a few dozen float32 terms in another order.
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}

BROKEN = 13
"""A sample that is not finite, for those who ask for it."""


def points(broken=False):
    x0 = normal_points(40, "uneven points")
    if broken:
        x0[BROKEN, 1] = torch.nan
    return Points(x0)


class Stream(IterableDataset):
    """Samples of one rank, without a length."""

    def __init__(self, batches):
        self.positions = list(itertools.chain(*batches))

    def __iter__(self):
        return map(points().__getitem__, self.positions)


class PerRank(LightningDataModule):
    """Each rank has batches of its own: lists of positions."""

    def __init__(self, batches, kind="map", broken=False):
        super().__init__()
        self.batches, self.kind, self.broken = batches, kind, broken

    def train_dataloader(self):
        own = self.batches[self.trainer.global_rank]
        if self.kind == "sizes":
            return DataLoader(points(), batch_size=len(own[0]))
        if self.kind == "stream":
            return DataLoader(Stream(own), batch_size=len(own[0]))
        return DataLoader(points(self.broken), batch_sampler=own)

    def val_dataloader(self):
        return DataLoader(points(), batch_size=20)


class Save(Callback):
    """Writes what a rank has seen and what it was warned of to a file of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.found = {"batches": [], "weights": [], "validations": [], "warnings": []}

    def setup(self, trainer, module, stage):
        self.catching = warnings.catch_warnings(record=True)
        self.warnings = self.catching.__enter__()
        warnings.simplefilter("always")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        estimate = module.estimate
        seen = {
            "epoch": trainer.current_epoch,
            "index": batch["index"],
            "noised": vars(estimate.noised),
            "target": estimate.target.x0,
        }
        self.found["batches"].append(seen)
        weights = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        self.found["weights"].append(weights)

    def on_validation_end(self, trainer, module):
        self.found["validations"].append(trainer.global_step)

    def on_train_end(self, trainer, module):
        skipped = trainer.callback_metrics.get("train/skipped_steps", 0)
        self.found |= {"skipped": float(skipped), "steps": trainer.global_step}
        self.catching.__exit__(None, None, None)
        self.found["warnings"] = [str(each.message) for each in self.warnings]
        torch.save(self.found, self.folder / f"{trainer.global_rank}.pt")


class Watched(DiffusionModule):
    """Writes what stops a rank to a file of its own."""

    folder = None

    def on_before_optimizer_step(self, optimizer):
        try:
            super().on_before_optimizer_step(optimizer)
        except ValueError as error:
            found = {"error": str(error), "levels": self.estimate.noised.noise_level}
            torch.save(found, self.folder / f"{rank()}.pt")
            raise


def build(**slots):
    return Watched(
        small_mlp(std=1.0),
        timesteps=LogUniform(0.05, 5.0),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        **slots,
    )


def fit(folder, module, data, *callbacks, **options):
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(
        Save(folder),
        *callbacks,
        strategy=DDPStrategy(start_method="fork", timeout=timedelta(seconds=30)),
        devices=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **(settings | options),
    )
    trainer.fit(module, data)
    return results(folder)


def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def positions(found):
    return [batch["index"].tolist() for batch in found["batches"]]


def assert_equal_weights(found):
    first, second = (torch.stack(each["weights"]) for each in found)
    assert torch.equal(first, second)
    assert first.isfinite().all()


FEW = [[0, 1, 2], [3, 4, 5]]
MANY = [[20, 21, 22], [23, 24, 25], [26, 27, 28], [29, 30, 31]]
LAST_IS_SMALL = [[20, 21, 22], [23]]


@pytest.mark.parametrize("shortest", [0, 1])
def test_an_epoch_ends_with_the_shortest_rank_and_a_warning_says_so(shortest, tmp_path):
    batches = [FEW, MANY] if shortest == 0 else [MANY, FEW]
    module = build(target=STF("batch"), draws=CARV(1))
    found = fit(tmp_path, module, PerRank(batches), accumulate_grad_batches=2)
    for each, own in zip(found, batches, strict=True):
        assert positions(each) == 2 * own[:2]
        assert [batch["epoch"] for batch in each["batches"]] == [0, 0, 1, 1]
        assert each["steps"] == 2
        assert each["validations"] == [1, 2]
    assert_equal_weights(found)
    told = [text for text in found[0]["warnings"] if "epochs end with the shortest" in text]
    assert told
    assert all(str([len(own) for own in batches]) in text for text in told)


def test_loaders_made_anew_are_looked_at_anew(tmp_path):
    data = PerRank([FEW, MANY])
    found = fit(tmp_path, build(), data, reload_dataloaders_every_n_epochs=1)
    assert [positions(each) for each in found] == [2 * FEW, 2 * MANY[:2]]
    assert_equal_weights(found)


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 1}], ids=["whole", "limited"])
def test_loaders_without_a_length_are_refused_on_all_ranks(options, tmp_path):
    data = PerRank([FEW, MANY], "stream")
    with pytest.raises(Exception, match="`train_dataloaders` must have a length on 2 ranks"):
        fit(tmp_path, build(), data, max_epochs=1, **options)


def test_a_rank_with_another_batch_size_is_refused(tmp_path):
    data = PerRank([[[0, 1, 2]], [[0, 1, 2, 3]]], "sizes")
    with pytest.raises(Exception, match=r"`batch_size` must be the same on all ranks.*\[3, 4\]"):
        fit(tmp_path, build(), data)


class Accumulate(Callback):
    """Gives the second rank a setting of its own."""

    def setup(self, trainer, module, stage):
        trainer.accumulate_grad_batches = 1 + trainer.global_rank


def test_a_rank_with_another_accumulation_is_refused(tmp_path):
    data = PerRank([FEW, FEW])
    with pytest.raises(Exception, match=r"`accumulate_grad_batches` must be the same.*\[1, 2\]"):
        fit(tmp_path, build(), data, Accumulate())


def test_a_fraction_of_an_epoch_is_one_of_the_shortest(tmp_path):
    data = PerRank([FEW, MANY])
    found = fit(tmp_path, build(), data, max_epochs=1, val_check_interval=0.5)
    assert [each["validations"] for each in found] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("draws", [1, 2])
def test_of_batches_of_different_sizes_each_sample_is_its_own_reference_once(draws, tmp_path):
    module = build(target=STF("batch"), draws=CARV(draws))
    found = fit(tmp_path, module, PerRank([FEW, LAST_IS_SMALL]), max_epochs=1)
    assert_equal_weights(found)
    for number in range(2):
        parts = [each["batches"][number] for each in found]
        own = torch.cat([part["index"] for part in parts])
        noised = [Noised(**part["noised"]) for part in parts]
        xt, x0, sigma = (
            torch.cat([getattr(part, name) for part in noised]) for name in ("xt", "x0", "sigma")
        )
        # by hand: EDM has alpha 1, and each sample stands in the batch once
        references = points().x0[own]
        assert torch.equal(references.repeat_interleave(draws, 0), x0)
        logits = -0.5 * (torch.cdist(xt.double(), references.double()) / sigma[:, None]) ** 2
        expected = logits.softmax(dim=1) @ references.double()
        target = torch.cat([part["target"] for part in parts])
        torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)
        assert float((target - x0).norm()) > 0.1


LARGE_AND_SMALL = [
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]],
    [[20, 21], [22, 23], [24, 25], [26]],
]


@pytest.mark.parametrize("every_n_steps", [1, None])
def test_gradients_are_measured_on_as_many_samples_as_all_ranks_have(
    every_n_steps, tmp_path, monkeypatch
):
    # as often as to measure in a few steps, by the cost that follows from the size of a batch
    monkeypatch.setattr(cadence, "TIME_BUDGET", 20)
    callback = GradientVariance(every_n_steps=every_n_steps, samples=4, noise_levels=2)
    found = fit(tmp_path, build(), PerRank(LARGE_AND_SMALL), callback, max_epochs=1)
    assert_equal_weights(found)
    assert [each["steps"] for each in found] == [4, 4]


def test_what_hinders_one_rank_from_measuring_per_sample_hinders_all(tmp_path, monkeypatch):
    seen = GradientMeasurement.why_unavailable
    monkeypatch.setattr(
        GradientMeasurement,
        "why_unavailable",
        lambda *arguments: "no memory" if rank() == 1 else seen(*arguments),
    )
    callback = GradientVariance(every_n_steps=1, samples=4, noise_levels=2)
    found = fit(tmp_path, build(), PerRank([MANY, MANY]), callback, max_epochs=1)
    assert_equal_weights(found)


def test_a_control_variate_is_fitted_on_batches_of_different_sizes(tmp_path):
    control = TaylorCV(bins=2, refit_every_n_steps=1, gate="open")
    module = build(target=STF("batch"), control_variate=control)
    found = fit(tmp_path, module, PerRank(LARGE_AND_SMALL), max_epochs=1)
    assert_equal_weights(found)


def test_a_pilot_waits_until_all_ranks_have_samples_enough(tmp_path, monkeypatch):
    measured = ResamplesPilot._components
    monkeypatch.setattr(ResamplesPilot, "_seconds", lambda *_: (4.0, 1.0))
    monkeypatch.setattr(ResamplesPilot, "_pass_seconds", lambda *_: (0.0, 1.0))
    # measured, for it needs samples; but what is found is left to no chance
    monkeypatch.setattr(ResamplesPilot, "_components", lambda x: (measured(x), (1.0, 32.0))[1])
    data = PerRank([MANY, [[0], [1], [2], [3]]])
    found = fit(tmp_path, build(draws=CARV()), data, max_epochs=3)
    assert_equal_weights(found)
    # eight of the second rank's samples: the batches of two epochs
    counts = [[len(batch["noised"]["t"]) for batch in each["batches"]] for each in found]
    assert all(count == 1 for count in counts[1][:7])
    assert counts[1][-1] > 1


TARGETS = {"plain": lambda: None, "batch": lambda: STF("batch")}
# the second step of the second rank meets it
WITH_BROKEN = [MANY, [[0, 1, 2], [3, BROKEN, 4], [5, 6, 7], [8, 9, 10]]]


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_that_is_not_finite_stops_both_ranks_with_one_message(target, tmp_path):
    module = build(target=TARGETS[target]())
    module.folder = tmp_path
    with pytest.raises(Exception, match=f"sample {BROKEN}"):
        fit(tmp_path, module, PerRank(WITH_BROKEN, broken=True))
    first, second = results(tmp_path)
    assert first["error"] == second["error"]
    level = second["levels"][1]
    assert first["error"].startswith(
        f"Optimizer step 1 met a number that is not finite: sample {BROKEN}, "
        f"noise level {float(level):.3g}, batch 0 of the step on rank 1, is not finite"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_that_is_skipped_is_skipped_by_both_ranks(target, tmp_path):
    module = build(target=TARGETS[target](), on_nonfinite="skip")
    found = fit(tmp_path, module, PerRank(WITH_BROKEN, broken=True), max_epochs=1)
    assert_equal_weights(found)
    for each in found:
        first, second, third, _ = each["weights"]
        assert torch.equal(first, second)
        assert not torch.equal(second, third)
        assert each["skipped"] == 1
    told = [text for text in found[0]["warnings"] if f"sample {BROKEN}, " in text]
    assert len(told) == 1
    assert "The step is left out" in told[0]
