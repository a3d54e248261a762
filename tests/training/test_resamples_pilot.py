"""The pilot that chooses how many draws of each sample pay."""

import logging

import pytest
import torch
from support.networks import small_mlp
from support.points import Points, normal_points
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import CARV, Clean, DiffusionModule, ResidualMLP
from lightning_vr.core.rng import generator
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.resamples_pilot import ResamplesPilot
from lightning_vr.variance.accounting import CostModel, best_resamples

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


POINTS = Points(normal_points(64, "points"))


def module(draws, kind=DiffusionModule, **options):
    options.setdefault("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=1e-2))
    return kind(small_mlp(16, std=0.1), draws=draws, **options)


def fit(model, steps=3, batch_size=16, ckpt_path=None, **options):
    torch.manual_seed(3)
    trainer = quiet_trainer(max_steps=steps, **options)
    trainer.fit(model, DataLoader(POINTS, batch_size=batch_size), ckpt_path=ckpt_path)
    return trainer


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.fixture
def costing(monkeypatch):
    """Set what a pilot times, and the components that it measures."""

    def cost(upstream, denoise=1.0, components=None):
        monkeypatch.setattr(ResamplesPilot, "_seconds", lambda *_: (upstream, denoise))
        monkeypatch.setattr(ResamplesPilot, "_pass_seconds", lambda *_: (0.0, denoise))
        if components is not None:
            monkeypatch.setattr(ResamplesPilot, "_components", lambda _: components)

    return cost


def test_with_a_cheap_encode_one_draw_is_taken_and_no_variance_is_measured(monkeypatch, caplog):
    monkeypatch.setattr(ResamplesPilot, "_components", lambda _: pytest.fail("was measured"))
    monkeypatch.setattr(ResamplesPilot, "_seconds", lambda *_: (0.04, 1.0))
    model = module(CARV())
    with caplog.at_level(logging.INFO):
        fit(model)
    assert model.draws.draws_per_sample == 1
    assert "no number of resamples could gain 5 %" in caplog.text


def test_an_encode_that_does_nothing_is_timed_as_cheap():
    model = module(CARV())
    fit(model)
    assert model.draws.draws_per_sample == 1


@pytest.mark.parametrize(
    ("upstream", "between", "within"), [(9.0, 1.0, 7.7), (9.0, 5.0, 1.0), (30.0, 1.0, 1.0)]
)
def test_k_is_that_of_least_variance_times_cost(costing, caplog, upstream, between, within):
    costing(upstream, components=(between, within))
    model = module(CARV())
    with caplog.at_level(logging.INFO):
        fit(model)
    best = best_resamples(between, within, CostModel(0, upstream, 1.0), largest=16)
    assert model.draws.draws_per_sample == best
    assert f"CARV: K = {best} draws of each sample from step 0 on (1 before)" in caplog.text


@pytest.mark.parametrize("largest", [1, 4, 7])
def test_k_is_bounded(costing, largest):
    costing(1e6, components=(1.0, 1e6))
    model = module(CARV(max_resamples=largest))
    fit(model)
    assert model.draws.draws_per_sample == largest


@pytest.mark.parametrize(("largest", "expected"), [(16, 8), (5, 4)])
def test_with_antithetic_pairs_k_is_even(costing, largest, expected):
    costing(9.0, components=(1.0, 7.7))
    model = module(CARV(antithetic=True, max_resamples=largest))
    assert model.draws.draws_per_sample == 2
    fit(model)
    assert model.draws.draws_per_sample == expected


def test_without_any_variance_between_samples_k_is_the_largest(costing):
    costing(1.0, components=(-0.1, 3.0))
    model = module(CARV())
    fit(model)
    assert model.draws.draws_per_sample == 16


def test_k_changes_only_for_a_gain_over_five_percent(costing):
    # from 2 to 3 draws: (1 + 3/2) (3 + 2) = 12.5 against (1 + 3/3) (3 + 3) = 12
    costing(3.0, components=(1.0, 3.0))
    model = module(CARV())
    model.draws.chosen = 2
    fit(model)
    assert model.draws.draws_per_sample == 2
    # and from 1 draw: 16 against 12
    model = module(CARV())
    fit(model)
    assert model.draws.draws_per_sample == 3


def test_pilots_run_at_their_cadence_and_pool_what_they_find(monkeypatch, costing):
    found = iter([(1.0, 8.0), (3.0, 8.0), (100.0, 8.0)])
    costing(9.0)
    monkeypatch.setattr(ResamplesPilot, "_components", lambda _: next(found))
    model = module(CARV(pilot_every_n_steps=4))
    fit(model, steps=8)
    assert model.draws.pilot == {"step": 4, "between": 2.0, "within": 8.0}


def test_a_resumed_run_keeps_k_and_its_pilots_cadence(tmp_path, costing, monkeypatch):
    costing(9.0, components=(1.0, 8.0))
    model = module(CARV(pilot_every_n_steps=10))
    fit(model, steps=4).save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr(ResamplesPilot, "_components", lambda _: pytest.fail("measured again"))
    again = module(CARV(pilot_every_n_steps=10))
    fit(again, steps=8, ckpt_path=tmp_path / "a.ckpt")
    assert again.draws.draws_per_sample == model.draws.draws_per_sample == 8


def test_the_pilot_does_not_disturb_training(costing):
    """Under a costly encode and a measured K of 1, weights are those of CARV(1)."""
    costing(9.0)
    plain, piloted = module(CARV(1)), module(CARV(max_resamples=1))
    for model in (plain, piloted):
        fit(model)
    assert piloted.draws.pilot.keys() == {"step", "between", "within"}
    assert torch.equal(weights(plain), weights(piloted))


def test_small_batches_are_gathered_until_they_tell_enough(costing):
    costing(9.0)
    model = module(CARV())
    fit(model, steps=7, batch_size=1)
    assert model.draws.pilot is None
    model = module(CARV())
    fit(model, steps=8, batch_size=1)
    assert model.draws.pilot["step"] == 7


class Trunk(DiffusionModule):
    """An upstream that is trained with the network."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.trunk = nn.Linear(2, 2)

    def encode(self, batch):
        return Clean(self.trunk(batch["x0"]), index=batch["index"])


def test_components_include_the_gradient_of_a_trained_upstream(costing):
    """Of a linear trunk by itself: with the network frozen there is no other gradient."""
    costing(9.0)
    model = module(CARV(), Trunk)
    model.network.requires_grad_(False)
    fit(model)
    assert model.draws.pilot["within"] > 0
    assert abs(model.draws.pilot["between"]) > 0


def test_the_pilot_finds_closed_form_components(z_score):
    """A loss ``(w - x - z)²/2`` has per draw the variances of x between and of z within samples."""

    class Model(DiffusionModule):
        def __init__(self):
            super().__init__(ResidualMLP(2, width=4, depth=1), draws=CARV(scope="none"))
            self.w = nn.Parameter(torch.zeros(2))

        def per_draw_losses(self, rows):
            noised = rows["noised"]
            error = self.w - 2.0 * noised["x0"] - noised["noise"]
            return 0.5 * error.square().sum(dim=1)

    model, found = Model(), []
    model._trainer = quiet_trainer()
    for i in range(60):
        model.seed = i
        pilot = model.make_resamples_pilot(RunContext.of(model.trainer))
        pilot._batches = [Clean(torch.randn(32, 2, generator=generator("x", i)))]
        found.append(pilot._components())
    between, within = torch.tensor(found).T
    assert abs(z_score(between, 8.0)) < 4
    assert abs(z_score(within, 2.0)) < 4
