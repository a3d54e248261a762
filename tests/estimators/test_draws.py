import math

import pytest
import torch

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import IID, open_uniform
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import EDM, VP
from lightning_vr.process.timesteps import LogNormal, Uniform
from lightning_vr.process.weightings import UnitWeighting


def draw(clean, seed=0, schedule=None, timesteps=None):
    objective = Objective(schedule or VP(), timesteps or Uniform(0.1, 0.9), UnitWeighting())
    return IID()(clean, objective, generator(seed))


def test_draws_are_a_function_of_the_generator():
    clean = Clean(torch.ones(4, 3))
    first, again, other = draw(clean, 1), draw(clean, 1), draw(clean, 2)
    assert torch.equal(first.xt, again.xt)
    assert not torch.equal(first.t, other.t)
    assert not torch.equal(first.noise, other.noise)


def test_x_t_is_the_sample_and_the_noise_at_the_scales_of_t(schedule):
    source = generator("x0")
    clean = Clean(torch.randn(16, 1, 4, 4, generator=source))
    noised = draw(clean, 0, schedule, schedule.default_timesteps())
    torch.testing.assert_close(noised.alpha, schedule.alpha(noised.t))
    torch.testing.assert_close(noised.sigma, schedule.sigma(noised.t))
    torch.testing.assert_close(noised.noise_level, schedule.noise_level(noised.t))
    torch.testing.assert_close(noised.xt, schedule.perturb(clean.x0, noised.noise, noised.t))


def test_times_follow_their_density_and_noise_is_normal(z_score):
    timesteps = LogNormal(-1.2, 1.2)
    noised = draw(Clean(torch.zeros(20_000, 2)), 0, EDM(), timesteps)
    scores = (noised.t.double().log() + 1.2) / 1.2
    for x in (scores, noised.noise.flatten()):
        assert abs(z_score(x)) < 4
        assert abs(z_score(x.square(), 1)) < 4
        assert abs(z_score(x**3)) < 4
        assert abs(z_score(x**4, 3)) < 4
    assert abs(z_score(noised.noise[:, 0] * scores)) < 4
    assert abs(z_score(noised.noise[:, 0] * noised.noise[:, 1])) < 4


def test_importance_weights_are_one():
    assert torch.equal(draw(Clean(torch.zeros(5, 2))).weight, torch.ones(5))


def test_labels_condition_and_index_stay_with_their_samples():
    group, index = torch.tensor([2, 0, 1]), torch.tensor([7, 5, 6])
    clean = Clean(torch.zeros(3, 2), group, {"text": torch.ones(3, 4)}, index)
    noised = draw(clean)
    assert noised.group is group
    assert noised.index is index
    assert noised.cond is clean.cond


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_noising_is_done_in_float32_or_better(given, used):
    x0 = torch.linspace(-1, 1, 12).reshape(4, 3).to(given)
    noised = draw(Clean(x0))
    assert noised.x0.dtype == noised.noise.dtype == noised.xt.dtype == used
    assert torch.equal(noised.x0, x0.to(used))
    assert noised.t.dtype == torch.float32


def test_uniform_numbers_never_reach_the_ends(monkeypatch):
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: ends)
    u = open_uniform(2, generator(0))
    assert 0 < u[0] < u[1] < 1
    assert torch.isfinite(LogNormal()(u)).all()
    assert math.log(float(u[0])) > -40
