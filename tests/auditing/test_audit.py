"""An audit on small models: its numbers, what it leaves alone, and nothing where nothing is."""

import copy
import functools
import logging
import os
import signal
import time

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_vr import (
    CARV,
    DSM,
    STF,
    Candidate,
    Clean,
    DiffusionModule,
    LearnedProposal,
    LogNormal,
    ResidualMLP,
    TaylorCV,
    audit,
)
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.data import EightGaussians
from lightning_vr.data.dataset import InMemoryDataset
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.moments import Moments

pytestmark = pytest.mark.filterwarnings("ignore:.*`max_epochs`")


def module(target=None, **settings):
    torch.manual_seed(0)
    network = ResidualMLP(width=16, depth=1)
    torch.nn.init.normal_(network.project_out.weight, std=0.1)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    return DiffusionModule(network, target=target, optimizer=optimizer, **settings)


def data(**settings):
    return EightGaussians(
        **({"batch_size": 32, "num_samples": 512, "num_validation": 32} | settings)
    )


RIVALS = [
    Candidate("all", target=STF("all")),
    Candidate("q", draws=CARV(1, LearnedProposal(bins=2))),
    Candidate("Taylor 0", control_variate=TaylorCV(gate="open")),
]
"""One for each slot; two of them learn."""


class Points(LightningDataModule):
    def __init__(self, points):
        super().__init__()
        self.points = InMemoryDataset(points, key="x0")

    def train_dataloader(self):
        return DataLoader(self.points, batch_size=32, shuffle=True)


@pytest.fixture(scope="module")
def compared():
    """An audit of the plain target beside STF over the whole data set."""
    rivals = [Candidate("all", target=STF("all"))]
    return audit(module(), data(), rivals, budget=60, progress=False)


def test_stf_has_less_variance_than_the_plain_target_and_the_audit_sees_it(compared):
    (rival,) = compared.estimators[1:]
    assert compared.current.name == "current"
    assert rival.efficiency.low > 1.2
    assert rival.config["target"]["init_args"]["references"] == "all"
    assert compared.batch == 32
    assert compared.repetitions >= 3
    assert compared.statistics.levels.total.isfinite().all()
    assert compared.statistics.fractions.sum() == pytest.approx(1)


def test_an_equal_estimator_saves_nothing_exactly():
    found = audit(module(), data(), [Candidate("same", target=DSM())], budget=1, progress=False)
    same = found.estimators[1]
    assert same.efficiency == same.multiplier == same.predicted_speedup == (1.0, 1.0, 1.0)
    assert not found.finalists


def test_winners_of_different_slots_are_measured_together_on_fresh_draws():
    rivals = [
        Candidate("all", target=STF("all")),
        Candidate("pairs", draws=CARV(2, antithetic=True)),
    ]
    found = audit(module(), data(), rivals, budget=30, progress=False)
    names = [each.name for each in found.finalists]
    assert "all, pairs" in names
    both = found.estimators[-1]
    assert both.name == "all, pairs"
    assert set(both.config) == {"target", "draws"}
    alone = [each.efficiency.estimate for each in found.estimators[1:3]]
    assert both.efficiency.estimate > max(alone)


def test_components_are_those_of_independent_measurements(compared):
    model, points = module(), data()
    names, groups = parameter_groups(model)
    measurement = GradientMeasurement(DiffusionLoss(model.train()), model.generator, groups)
    points.setup("fit")
    dataset = points.train_dataloader().dataset
    x0 = torch.stack([dataset[i]["x0"] for i in range(len(dataset))])
    alone = Moments(5, 1 + len(names))
    for i in range(25):
        rows = torch.randperm(len(x0))[:256]
        alone.add(torch.stack(measurement.per_sample(Clean(x0[rows]), "alone", i)))
    audited, error = torch.stack(compared.current.components), torch.stack(compared.current.errors)
    z = (audited - alone.mean)[:, 0] / (error**2 + alone.error**2).sqrt()[:, 0]
    assert z.abs().max() < 4


def test_the_exact_target_on_well_separated_data_at_low_noise_leaves_nothing_to_save():
    points = 20 * torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    separated = Points(points)
    low = LogNormal(mean=-6.0, std=0.1)
    exact = module(STF("all"), timesteps=low, sigma_data=20.0)
    rivals = [Candidate("DSM", target=DSM()), Candidate("batch", target=STF("batch"))]
    found = audit(exact, separated, rivals, budget=30, progress=False)
    for rival in found.estimators[1:]:
        assert rival.efficiency.estimate == pytest.approx(1, abs=1e-4)
    assert "Variance reduction does not pay here" in found.advice


def audit_in_place(model):
    """Audit a module, of which nothing changes, nor of the random state."""
    before = copy.deepcopy(model.state_dict())
    slots, seed, state = model.target, model.seed, torch.get_rng_state()
    audit(model, data(), RIVALS, budget=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.target is slots
    assert model.seed is seed
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_audit_that_fails_leaves_the_module_and_the_settings_of_the_trainer_as_they_were():
    model, points = module(STF(16)), data(batch_size=300)
    model.sample_shape, model.estimate = (7,), None
    fit = half_precision(1.0)
    fit.callbacks.append(Callback())
    fit.fit_loop.max_epochs = 5
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    callbacks, target = fit.callbacks, model.target
    with pytest.raises(ValueError, match="two whole batches"):
        audit(model, points, budget=1, progress=False, trainer=fit)
    assert (model.seed, model.estimate, model.sample_shape) == (None, None, (7,))
    assert model.target is target
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert fit.callbacks is callbacks
    assert (fit.limit_val_batches, fit.max_epochs, fit.max_steps) == (1.0, 5, -1)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_audit_changes_nothing_and_training_after_it_is_what_it_would_have_been():
    def train(is_audited):
        model = module(STF(16))
        torch.manual_seed(1)
        if is_audited:
            audit_in_place(model)
        Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        ).fit(model, data())
        return torch.nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(train(is_audited=True), train(is_audited=False))


def test_candidates_that_have_no_references_are_left_out_and_named():
    class Conditional(DiffusionModule):
        def encode(self, batch):
            return Clean(batch["x0"], cond={"class_labels": batch["index"] % 3})

    torch.manual_seed(0)
    model = Conditional(ResidualMLP(width=16, depth=1, num_class_embeds=3))
    found = audit(model, data(), [Candidate("few", target=STF(8))], budget=1, progress=False)
    assert [m.name for m in found.estimators] == ["current"]
    assert "condition" in found.skipped["few"]
    assert "does not pay" in found.advice


class Moving(DiffusionModule):
    """Encodes a sample as another each time, and passes no indices on."""

    def encode(self, batch):
        x0 = batch["x0"]
        return Clean(x0 + torch.randn_like(x0))


def test_a_candidate_with_drawn_references_warns_of_a_random_encode_without_indices(caplog):
    torch.manual_seed(0)
    moving = Moving(ResidualMLP(width=16, depth=1))
    with caplog.at_level(logging.WARNING):
        audit(moving, data(), [Candidate("STF(8)", target=STF(8))], budget=0.1)
    assert sum("differ from the bank's copies" in each.message for each in caplog.records) == 1


def test_banks_of_samples_that_do_not_come_equally_often_are_left_out_and_named():
    points = data()
    points.setup("fit")
    dataset = points.train_dataloader().dataset
    sampler = WeightedRandomSampler([1.0] + [0.5] * (len(dataset) - 1), len(dataset))
    points.train_dataloader = lambda: DataLoader(dataset, 32, sampler=sampler)
    rivals = [Candidate("all", target=STF("all")), Candidate("batch", target=STF("batch"))]
    found = audit(module(), points, rivals, budget=1, progress=False)
    assert [m.name for m in found.estimators] == ["current", "batch"]
    assert found.skipped == {"all": "training samples do not come equally often"}


class Dear(DiffusionModule):
    """Its `encode` takes longer than a step, so that a pilot measures."""

    def encode(self, batch):
        time.sleep(0.02)
        return super().encode(batch)


def half_precision(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )


def test_in_float16_a_scale_of_losses_is_found_at_which_gradients_are_finite():
    found = {
        scale: audit(module(), data(), [], budget=2, progress=False, trainer=half_precision(scale))
        for scale in (1.0, 2.0**60)
    }
    first, second = (float(each.current.components.total[0]) for each in found.values())
    assert first == pytest.approx(second, rel=0.02)


def test_a_pilot_that_meets_no_finite_gradients_ends():
    torch.manual_seed(0)
    model = Dear(ResidualMLP(width=16, depth=1), draws=CARV("auto"))
    torch.nn.init.constant_(model.network.project_out.weight, torch.nan)
    rivals = [Candidate("auto", draws=CARV("auto"))]
    found = audit(model, data(), rivals, budget=1, progress=False)
    assert found.skipped["auto"] == "gradients are not finite"


def test_an_audit_that_is_asked_to_stop_stops():
    class Asked(DiffusionModule):
        def encode(self, batch):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().encode(batch)

    with pytest.raises(SIGTERMException):
        audit(Asked(ResidualMLP(width=16, depth=1)), data(), [], budget=1000, progress=False)


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(ValueError, match="`budget` must be positive and finite, got 0"):
        audit(module(), data(), budget=0)
    with pytest.raises(ValueError, match="two whole batches"):
        audit(module(), data(batch_size=300), budget=1, progress=False)

    class Foreign(LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError("never called")

        def configure_optimizers(self):
            return None

    with pytest.raises(MisconfigurationException, match="GradientVariance"):
        audit(Foreign(), data(), budget=1, progress=False)
