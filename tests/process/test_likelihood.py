"""Bits per dimension under exact denoisers, against densities in closed form."""

import math

import pytest
import torch

from lightning_vr.data.mixture import GaussianMixture
from lightning_vr.process.likelihood import Likelihood
from lightning_vr.process.schedules import EDM, VP, RectifiedFlow

SCHEDULES = pytest.mark.parametrize(
    "kind", [EDM, VP, RectifiedFlow], ids=lambda kind: kind.__name__
)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.5, 0.1], [0.2, 0.1, 0.3]])


def correlated(dimension=3):
    """One Gaussian of a given covariance, or of a random one above three dimensions."""
    covariance = COVARIANCE
    if dimension > 3:
        factor = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(3))
        covariance = factor @ factor.T / dimension + 0.1 * torch.eye(dimension)
    return GaussianMixture(torch.zeros(1, dimension), covariances=covariance[None]).double()


def denoiser(data, schedule):
    """The exact denoiser; it takes labels and conditions as networks do."""

    def denoise(xt, t, group, cond):
        return data.posterior_mean(xt, schedule.alpha(t), schedule.sigma(t))

    return denoise


def truth(data, x0):
    """The exact bits per dimension."""
    return -data.log_density(x0, 1.0, 0.0) / (x0.shape[1] * math.log(2))


def bits(data, schedule, x0, source, **settings):
    settings = {"tolerance": 1e-6} | settings
    return Likelihood(**settings).bits_per_dimension(denoiser(data, schedule), schedule, x0, source)


@SCHEDULES
def test_bits_of_a_correlated_gaussian_are_those_of_its_density_sample_by_sample(kind, source):
    data = correlated()
    x0, _ = data.sample(50, source)
    found = bits(data, kind(), x0, source)
    # the prior lacks the variance of the data: an error of its ratio to s_max²
    torch.testing.assert_close(found, truth(data, x0), rtol=0, atol=5e-4)


@SCHEDULES
def test_bits_of_a_mixture_are_within_one_percent_of_its_entropy(kind, source):
    means = torch.tensor([[-1.0], [0.2], [0.9]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    data = GaussianMixture(means, std=torch.tensor([0.1, 0.3, 0.05]).double(), weights=weights)
    grid = torch.linspace(-4, 4, 40_001, dtype=torch.float64)[:, None]
    log_density = data.log_density(grid, 1.0, 0.0)
    probability = log_density.exp() * (8 / 40_000)
    entropy = -float((probability * log_density).sum()) / math.log(2)

    # equally likely quantiles: their mean is the entropy but for a part in a thousand
    quantiles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    x0 = grid[torch.searchsorted(probability.cumsum(0), quantiles)]
    found = bits(data, kind(), x0, source, tolerance=Likelihood().tolerance)
    assert float(found.mean()) == pytest.approx(entropy, rel=0.01)
    precise = bits(data, kind(), x0[::10], source)
    torch.testing.assert_close(precise, truth(data, x0[::10]), rtol=1e-3, atol=2e-3)


def test_random_probes_are_unbiased_and_their_error_is_in_that_of_the_mean(source, z_score):
    data = correlated(20)
    x0, _ = data.sample(200, source)
    exact = bits(data, EDM(), x0, source, probes="exact")
    torch.testing.assert_close(exact, truth(data, x0), rtol=1e-3, atol=1e-3)
    one = bits(data, EDM(), x0, source)  # above 16 dimensions
    four = bits(data, EDM(), x0, source, probes=4)
    assert abs(z_score(one - exact)) < 4
    assert abs(z_score(four - exact)) < 4
    assert float((one - exact).std()) > 0.02
    assert float((one - exact).std() / (four - exact).std()) == pytest.approx(2, rel=0.2)


def test_below_the_smallest_noise_level_the_error_is_of_fourth_order(source):
    data = correlated()
    x0, _ = data.sample(50, source)
    errors, levels = [], (0.05, 0.1)
    for low in levels:
        found = bits(data, EDM(sigma_min=low, sigma_max=1000.0), x0, source, tolerance=1e-8)
        errors.append(float((found - truth(data, x0)).norm()))
        # the density at the smallest level, in place of that of the data
        smoothed = -data.log_density(x0, 1.0, low) / (3 * math.log(2))
        assert errors[-1] < 0.25 * float((smoothed - truth(data, x0)).norm())
    assert math.log2(errors[1] / errors[0]) == pytest.approx(4, abs=0.7)


def test_pixels_cost_the_bits_of_their_levels_and_a_bound_that_is_close(source):
    data = GaussianMixture(torch.zeros(1, 4), std=0.3).double()
    step = 2 / 255
    x0 = (((data.sample(400, source)[0] + 1) / step).round() * step - 1).clamp(-1, 1)
    normal = torch.distributions.Normal(0.0, 0.3)
    x0 = x0.double()
    masses = normal.cdf(x0 + step / 2) - normal.cdf(x0 - step / 2)
    expected = -masses.log2().mean(1)
    found = bits(data, EDM(), x0, source, levels=256)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=2e-3)
    assert float(expected.mean()) > 5


def test_labels_and_conditions_reach_the_denoiser(source):
    group, cond = torch.arange(5), {"text": torch.ones(5, 2)}

    def denoise(xt, t, given_group, given_cond):
        assert given_group is group
        assert given_cond is cond
        return 0.5 * xt

    found = Likelihood().bits_per_dimension(
        denoise, RectifiedFlow(), torch.randn(5, 2), source, group=group, cond=cond
    )
    assert found.shape == (5,)


def test_it_works_within_inference_mode_on_weights_that_train(source):
    network = torch.nn.Linear(2, 2)
    with torch.inference_mode():
        x0 = torch.randn(5, 2)
        found = Likelihood().bits_per_dimension(
            lambda xt, t, group, cond: network(xt), VP(), x0, source
        )
    assert found.isfinite().all()
    assert network.weight.grad is None


def test_wrong_settings_and_samples_off_the_levels_are_refused(source):
    with pytest.raises(ValueError, match="`probes` must be at least 1"):
        Likelihood(probes=0)
    with pytest.raises(ValueError, match="`tolerance` must be positive"):
        Likelihood(tolerance=0.0)
    with pytest.raises(ValueError, match=r"`levels` must be the number .*, got 256: correct it"):
        bits(correlated(), EDM(), torch.randn(4, 3), source, levels=256)
