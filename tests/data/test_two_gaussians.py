import math

import numpy as np
import pytest
import torch

from lightning_vr.data import TwoGaussians, two_gaussians_target_variance

TABLE = {
    1.0: 0.633663,
    2.0: 0.0402994,
    3.0: 0.017176,
    4.0: 0.0196515,
    6.0: 0.0136496,
    8.0: 0.0071798,
    12.0: 2.12585e-3,
    20.0: 3.48243e-4,
    50.0: 1.00866e-5,
}


def test_target_variance_of_the_default_pair_is_the_table_of_the_notes():
    sigma = torch.tensor(list(TABLE))
    expected = torch.tensor(list(TABLE.values()), dtype=torch.float64)
    torch.testing.assert_close(
        TwoGaussians().target_variance(1.0, sigma), expected, rtol=1e-5, atol=0
    )


def test_target_variance_of_two_points_in_x0_units_is_that_of_the_notes():
    sigma = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    variance = two_gaussians_target_variance(1.0, sigma, distance=1.0, std=0.0, dimension=1)
    expected = torch.tensor([0.068597, 0.4496, 0.795946, 0.941054], dtype=torch.float64)
    torch.testing.assert_close(variance * sigma**4, expected, rtol=0, atol=1e-6)


def test_target_variance_is_what_gauss_hermite_nodes_give_for_overlapping_gaussians():
    alpha, distance, std, dimension = 0.7, 1.3, 0.4, 5
    sigma = torch.tensor([0.9, 1.5, 4.0, 20.0], dtype=torch.float64)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(128))
    weights = weights / math.sqrt(2 * math.pi)

    noised = (alpha * std) ** 2 + sigma**2
    a = (alpha * distance / noised.sqrt())[:, None]
    overlap = (weights / (a**2 + a * nodes).cosh().square()).sum(1)
    expected = alpha**2 * (
        dimension * std**2 / (sigma**2 * noised) + distance**2 / noised**2 * overlap
    )

    actual = two_gaussians_target_variance(
        alpha, sigma, distance=distance, std=std, dimension=dimension
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("separation", [2.0, 4.0, 8.0])
def test_target_variance_is_exact_for_distant_points_too(separation):
    u = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
    density = (-((u - separation**2) ** 2) / (2 * separation**2)).exp()
    overlap = torch.trapezoid(density / u.cosh().square(), u) / (
        separation * math.sqrt(2 * math.pi)
    )
    actual = two_gaussians_target_variance(separation, 1.0, distance=1.0, std=0.0, dimension=1)
    torch.testing.assert_close(actual, separation**2 * overlap, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.8), (0.6, 2.0), (1.0, 6.0)])
def test_target_variance_is_the_mean_posterior_variance_of_the_mixture(alpha, sigma):
    pair = TwoGaussians(dimension=4, mean=0.9, std=0.5)
    generator = torch.Generator().manual_seed(0)
    x0, _ = pair.mixture.sample(20_000, generator)
    xt = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)

    in_score_units = alpha**2 / sigma**4 * pair.mixture.posterior_variance(xt, alpha, sigma)
    excess = in_score_units - pair.target_variance(alpha, sigma)
    assert abs(float(excess.mean() / (excess.std() / math.sqrt(len(excess))))) < 4


def test_target_variance_keeps_the_shape_of_the_noise_levels():
    pair = TwoGaussians()
    assert pair.target_variance(1.0, 2.0).shape == ()
    assert pair.target_variance(torch.ones(3), 2.0).shape == (3,)


def test_noise_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"`sigma` must be positive, got 0\.0"):
        TwoGaussians().target_variance(1.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "`dimension` must be at least 1, got 0"),
        ({"std": -0.1}, "`std` must be at least 0, got -0.1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoGaussians(**arguments)


def test_points_are_draws_of_the_mixture_labelled_by_component():
    pair = TwoGaussians(dimension=8, num_samples=4096)
    pair.setup()
    data = pair.train_dataset
    centred = data.x - pair.mixture.means[data.label]

    z_mean = centred.mean() / (0.1 / math.sqrt(centred.numel()))
    z_variance = (centred.square().mean() / 0.01 - 1) / math.sqrt(2 / centred.numel())
    assert abs(z_mean) < 4
    assert abs(z_variance) < 4
    assert pair.shape == (8,)
