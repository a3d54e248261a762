"""The numbers of reverse steps and the terms of the bound, against other formulas."""

import math

import diffusers
import pytest
import torch
from support.gaussian_reverse import scheduler, table
from torch.distributions import Normal, kl_divergence

from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.reverse_steps import ReverseSteps, data_nll, gaussian_divergence
from lightning_vr.process.schedules import EDM, VP


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_the_numbers_are_those_of_diffusers_scheduler(betas):
    own = scheduler(50, betas)
    steps = ReverseSteps.of(DiffusersSchedule(own))
    torch.testing.assert_close(steps.log_beta.exp(), own.betas.double(), rtol=2e-4, atol=0)
    x, x0 = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
    own.config.clip_sample, own.config.prediction_type = False, "sample"
    v = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64)[None]
    for t in (1, 7, 49):
        said = own._get_variance(t, predicted_variance=v, variance_type="learned_range")
        own_step = steps.at(torch.tensor([t]), torch.float64)
        learned = own_step.log_variance(v, "learned", v)
        torch.testing.assert_close(said.double(), learned, rtol=1e-3, atol=1e-4)
        variance = own._get_variance(t).double()
        torch.testing.assert_close(steps.log_beta_tilde[t].exp(), variance, rtol=1e-3, atol=0)
        source = torch.Generator().manual_seed(1)
        found = own.step(x0, t, x, generator=source).prev_sample
        noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
        mean = steps.x0_scale[t] * x0 + steps.xt_scale[t] * x
        expected = mean + float(steps.log_beta_tilde[t].exp().sqrt()) * noise
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-4)


def test_steps_over_some_timesteps_are_the_steps_of_a_process_of_these():
    """Bayes' rule for three normal variables, by matrices."""
    steps = ReverseSteps.of(table(1000), 7)
    assert steps.timesteps.tolist() == [0, 166, 333, 500, 666, 832, 999]
    for k in range(1, 7):
        a, b = steps.alpha[k - 1] ** 2, steps.alpha[k] ** 2
        prior, ratio = 1 - a, b / a
        precision = 1 / prior + ratio / (1 - ratio)
        torch.testing.assert_close(steps.log_beta_tilde[k].exp(), 1 / precision)
        torch.testing.assert_close(steps.x0_scale[k], a.sqrt() / prior / precision)
        torch.testing.assert_close(steps.xt_scale[k], ratio.sqrt() / (1 - ratio) / precision)
    assert (steps.x0_scale[0], steps.xt_scale[0]) == (1, 0)
    assert steps.log_beta_tilde[0] == steps.log_beta_tilde[1]


def test_the_divergence_is_that_of_normal_distributions(source):
    mean, log_true, log_model = torch.randn(3, 200, generator=source, dtype=torch.float64)
    true, model = Normal(mean, (log_true / 2).exp()), Normal(0.0, (log_model / 2).exp())
    found = gaussian_divergence(mean, log_true, log_model)
    torch.testing.assert_close(found, kl_divergence(true, model))


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.05), (-0.97, 0.3), (1.4, 0.02), (0.0, 1e-3)])
def test_the_likelihood_of_a_bin_is_the_integral_of_the_density(mean, std):
    levels = 16
    pixels = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_variance = torch.full_like(pixels, 2 * math.log(std))
    found = data_nll(pixels, torch.full_like(pixels, mean), log_variance, levels)
    torch.testing.assert_close((-found).exp().sum(), torch.ones_like(found[0]))

    low, high = pixels - 1 / (levels - 1), pixels + 1 / (levels - 1)
    low[0], high[-1] = min(-1, mean) - 12 * std, max(1, mean) + 12 * std
    # by steps that resolve the density where it is
    low, high = (x.clamp(mean - 12 * std, mean + 12 * std) for x in (low, high))
    share = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x = torch.lerp(low[:, None], high[:, None], share)
    masses = Normal(mean, std).log_prob(x).exp().mean(1) * (high - low)
    torch.testing.assert_close((-found).exp(), masses, rtol=1e-5, atol=1e-14)


def test_far_from_the_mean_the_likelihood_of_a_bin_and_its_gradient_are_finite():
    log_variance = torch.full((3,), -12.0, requires_grad=True)
    found = data_nll(torch.tensor([-1.0, 0.2, 1.0]), torch.tensor(0.0), log_variance, 256)
    found.sum().backward()
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(log_variance.grad).all())
    # of a far bin nearly all is at its near edge
    z = (0.2 - 1 / 255) * math.exp(6.0)
    assert float(found[1].detach()) == pytest.approx(0.5 * z**2, rel=1e-2)


def test_the_density_of_continuous_data_is_that_of_a_normal_distribution(source):
    x0, mean, log_variance = torch.randn(3, 50, generator=source)
    expected = -Normal(mean, (log_variance / 2).exp()).log_prob(x0)
    torch.testing.assert_close(data_nll(x0, mean, log_variance, None), expected)


@pytest.mark.parametrize(
    "schedule", [VP(), EDM(), DiffusersSchedule(diffusers.FlowMatchEulerDiscreteScheduler())]
)
def test_schedules_without_steps_are_refused(schedule):
    with pytest.raises(ValueError, match="`schedule` must be a table of timesteps"):
        ReverseSteps.of(schedule)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="`steps` must be at most 20"):
        ReverseSteps.of(table(20), 21)
