"""The total weight of an objective, and its split into density and weight."""

import math

import diffusers
import pytest
import torch

from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import EDM, VE, VP
from lightning_vr.process.timesteps import LogNormal, Uniform
from lightning_vr.process.total_weight import TotalWeighting
from lightning_vr.process.weightings import EDMWeighting, UnitWeighting

WIDE = torch.float64
LEVELS = torch.logspace(-1.5, 1, 40, dtype=WIDE)


def edm(sigma_data=0.5):
    return Objective(EDM(), LogNormal(), EDMWeighting(sigma_data), sigma_data=sigma_data)


def expectation(objective, error, count=200_000):
    """The loss of an objective whose squared error of epsilon is ``error(s)``, and ``E w²``."""
    t = objective.times(count)
    level = objective.schedule.noise_level(t)
    weight = objective.weighting(objective.schedule, t) * level**2
    return float((weight * error(level)).mean()), float((weight**2 * error(level)).mean())


def test_the_total_weight_of_edm_is_a_bell():
    found = edm().total_weight(LEVELS)
    bell = torch.exp(-0.5 * ((LEVELS.log() + 1.2) / 1.2) ** 2) / (1.2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found, (1 + 4 * LEVELS**2) * bell)


def test_the_loss_is_the_integral_of_the_total_weight(schedule):
    objective = Objective(schedule, schedule.default_timesteps(), UnitWeighting("v"))
    low, high = objective.noise_levels(1000)[[0, -1]].log().tolist()
    logs = torch.linspace(low - 8, high + 8, 400_000, dtype=WIDE)
    level = logs.exp()
    t = schedule.time(level)
    inside = (t > schedule.t_min) & (t < schedule.t_max)

    def error(level):
        return level**2 / (1 + level**2) ** 3

    values = torch.where(inside, objective.total_weight(level) * error(level), 0)
    loss, _ = expectation(objective, error)
    assert float(torch.trapezoid(values, logs)) == pytest.approx(loss, rel=2e-3)


def test_a_table_of_timesteps_has_a_total_weight():
    schedule = DiffusersSchedule(diffusers.DDPMScheduler(1000))
    objective = Objective(schedule, schedule.default_timesteps(), UnitWeighting("epsilon"))
    t = torch.tensor([10.5, 300.5, 900.5], dtype=WIDE)
    step = (schedule.noise_level(t + 0.5) / schedule.noise_level(t - 0.5)).log()
    found = objective.total_weight(schedule.noise_level(t))
    torch.testing.assert_close(found, 1 / (1000 * step), rtol=1e-4, atol=0)


@pytest.mark.parametrize("own", [edm(), Objective(VP(), Uniform(1e-3, 1.0), UnitWeighting())])
def test_a_split_has_the_wanted_total_weight_and_the_least_second_moment(own):
    def moment(level):
        return 0.1 + level**3 / (1 + level**2)

    total = torch.exp(-0.5 * ((LEVELS.log() + 0.5) / 0.7) ** 2)
    weight = own.weighting(own.schedule, own.schedule.time(LEVELS)) * LEVELS**2
    measured = weight**2 * moment(LEVELS)
    split = own.split(LEVELS.tolist(), total.tolist(), measured.tolist())
    torch.testing.assert_close(split.total_weight(LEVELS[1:-1]), total[1:-1], rtol=1e-6, atol=0)

    # the least E w² m is (∫ W sqrt(m))² by Cauchy and Schwarz
    logs = LEVELS.log()
    least = float(torch.trapezoid(total * moment(LEVELS).sqrt(), logs)) ** 2
    loss, second = expectation(split, moment)
    assert second == pytest.approx(least, rel=0.02)
    plain = Objective(
        VE(0.04, 9.0), Uniform(), TotalWeighting(LEVELS.tolist(), total.tolist(), Uniform())
    )
    other_loss, other_second = expectation(plain, moment)
    assert loss == pytest.approx(other_loss, rel=5e-3)  # the same objective
    assert second < 0.9 * other_second


def test_a_learned_proposal_knows_second_moments_for_a_split():
    objective, proposal = edm(), LearnedProposal(bins=4)
    v = (torch.arange(64, dtype=WIDE) + 0.5) / 64
    proposal.observe(v, torch.full_like(v, 2.0), 3 * v)
    with pytest.raises(ValueError, match=r"Every bin must have had 8 draws .* got 0 in one"):
        proposal.second_moments(objective)
    proposal.advance()
    levels, moments = proposal.second_moments(objective)
    torch.testing.assert_close(levels, objective.noise_levels(4))
    torch.testing.assert_close(moments, 6 * v.reshape(4, 16).mean(dim=1))
    split = objective.split(levels.tolist(), [1.0] * 4, moments.tolist())
    torch.testing.assert_close(split.total_weight(levels[1:3]), torch.ones(2, dtype=WIDE))


def test_second_moments_are_those_of_gradients_and_positive():
    with pytest.raises(ValueError, match=r"`moment` must be 'gradient' .* got 'loss'"):
        LearnedProposal("loss").second_moments(edm())
    with pytest.raises(ValueError, match="`second_moments` must be positive, got"):
        edm().split([0.1, 1.0], [1.0, 1.0], [0.0, 1.0])
