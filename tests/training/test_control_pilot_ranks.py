"""A control variate that is fitted on two ranks, each with draws of its own."""

import functools
import math

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import (
    Clean,
    Cosine,
    DiffusionModule,
    ResidualMLP,
    TaylorCV,
    Uniform,
    UnitWeighting,
)
from lightning_vr.core.distributed import rank
from lightning_vr.core.rng import generator
from lightning_vr.estimators.taylor.coefficients import PilotStatistics
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.training.control_measurement import ControlMeasurement

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    # torch 2.13 loads its forward-mode derivatives with it, nothing of ours
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]

POINTS = torch.randn(64, 2, generator=generator("points of ranks"))
SAMPLES, PILOTS = 20, 40


class Saved(DiffusionModule):
    """Writes what each rank has learned to a file of its own."""

    folder = None

    def on_train_end(self):
        found = {
            "state": self.control_variate.get_extra_state(),
            "weights": torch.nn.utils.parameters_to_vector(self.parameters()).detach(),
            "t": self.estimate.noised.t,
            "control": self.estimate.control,
        }
        torch.save(found, self.folder / f"{rank()}.pt")


CONTROLS = {
    "auto": lambda: TaylorCV(bins=4, refit_every_n_steps=1),
    "open": lambda: TaylorCV(1, bins=2, gate="open", refit_every_n_steps=2),
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """What both ranks have learned."""

    @functools.cache
    def fit(name):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(5)
        model = Saved(
            ResidualMLP(2, width=8, depth=1),
            timesteps=LogUniform(0.001, 1000.0),
            control_variate=CONTROLS[name](),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        )
        model.folder = folder
        two_ranks = {"strategy": "ddp_fork", "devices": 2}
        trainer = quiet_trainer(**two_ranks, accumulate_grad_batches=2, max_steps=4)
        trainer.fit(model, DataLoader(POINTS, batch_size=4))
        return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]

    return fit


@pytest.mark.parametrize("name", CONTROLS)
def test_both_ranks_learn_the_same_of_draws_that_differ(name, fitted):
    first, second = fitted(name)
    assert first["state"] == second["state"]
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["t"], second["t"])
    state = first["state"]
    assert state["pilot"]["count"] == {"auto": 4, "open": 2}[name]
    coefficients = torch.tensor(state["fit"]["coefficients"])
    assert coefficients.isfinite().all()
    assert float((coefficients - 1).abs().max()) > 1e-4
    if name == "auto":
        assert len(state["fit"]["cost"]) == 2
    else:
        assert all(one["control"].any() for one in (first, second))


class Constant(nn.Module):
    """Says the same at all points."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x, t):
        return self.w + 0 * x


class Parts:
    """A trainer, as far as a measurement asks it."""

    precision_plugin, accumulate_grad_batches = Precision(), 1


def pilots(rank):
    """What pilots find on a rank, and what they would find with numbers of that rank alone."""
    model = DiffusionModule(
        Constant(),
        schedule=Cosine(),
        timesteps=Uniform(0, 1),
        weighting=UnitWeighting("v"),
        prediction="v",
        control_variate=TaylorCV(bins=2),
    )
    model._trainer = Parts()
    found = []
    for own in (False, True):
        pilot = ControlMeasurement(model, model.control_variate, RunContext.of(model.trainer))
        if own:
            pilot.over_ranks = lambda values: values.double()
        some = []
        for i in range(PILOTS):
            clean = Clean(torch.randn(SAMPLES, 2, generator=generator("x", i, rank)))
            some.append(pilot.measure(clean, lambda *key, i=i: generator(i, rank, *key)))
        found.append([torch.stack(x) for x in zip(*some, strict=True)])
    return found


@pytest.fixture(scope="module")
def found(on_two_ranks):
    """What is found by both, and alone, on each rank."""
    return [[PilotStatistics(*some) for some in one] for one in on_two_ranks(pilots)]


def test_what_is_found_is_the_mean_over_the_ranks(found):
    (both, first), (same, second) = found
    for a, b, one, other in zip(both, same, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, (one + other) / 2)
    assert not torch.equal(first.products, second.products)


def test_what_is_found_is_that_of_a_step_of_both_ranks(found, z_score):
    """In closed form, as on one rank of twice as many samples."""
    both = found[0][0]
    for b, square in enumerate((0.5 + 1 / math.pi, 0.5 - 1 / math.pi)):
        expected = square / (2 * SAMPLES)
        assert abs(z_score(both.products[:, b, 0], expected)) < 4
        assert abs(z_score(both.squares[:, b, 0, 0], expected)) < 4
    assert abs(z_score(both.second_moment, 0.5 + 2 / (2 * SAMPLES))) < 4
