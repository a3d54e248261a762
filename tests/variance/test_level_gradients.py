"""Products of mean gradients at noise levels, against a linear denoiser on a Gaussian."""

import pytest
import torch
from torch import nn

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.process.timesteps import Uniform
from lightning_vr.training.noisy_losses import GivenLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.gradient_sketch import sketched
from lightning_vr.variance.level_gradients import level_products
from lightning_vr.variance.signal_statistics import SignalStatistics

LEVELS = 3
HALF = 2
MEASUREMENTS = 150
DENOISER = torch.tensor([[0.5, 0.3], [-0.2, 0.4]])


class Linear(nn.Module):
    """``½ ‖A x_t - x0‖²`` with ``x_t = x0 + t noise``, x0 and noise standard normal."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(DENOISER.clone())


def error(module, x0, noise, t):
    return 0.5 * ((x0 + t[:, None] * noise) @ module.matrix.mT - x0).square().sum(1)


def truth():
    """Mean gradients of all times and of each bin ``(1 + L, 4)``, and traces of covariance."""
    a, eye = DENOISER.double(), torch.eye(2, dtype=torch.float64)
    t = 2 * (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000  # of Uniform(0, 2)
    scale = (1 + t**2)[:, None, None]
    mean = a * scale - eye  # E r xᵀ of the residual r = A x - x0
    residual = a @ a.mT * scale - a - a.mT + eye
    # of Gaussians E ‖r‖² ‖x‖² = tr R tr X + 2 ‖E r xᵀ‖²
    trace = residual.diagonal(dim1=1, dim2=2).sum(1) * 2 * scale[:, 0, 0]
    square = trace + 2 * mean.square().sum(dim=(1, 2))
    parts = [slice(0, 3000), *(slice(i * 1000, (i + 1) * 1000) for i in range(LEVELS))]
    means = torch.stack([mean[part].mean(0).flatten() for part in parts])
    squares = torch.stack([square[part].mean() for part in parts])
    return means, squares - means.square().sum(1)


def measurement(*key):
    def source(*more):
        return generator("levels", *key, *more)

    loss = GivenLoss(Linear(), error, Uniform(0.0, 2.0))
    return GradientMeasurement(loss, source, [0]), source


def halves(*key, size=HALF):
    x = torch.randn(2, size, 2, generator=generator("points of levels", *key))
    return [Clean(half) for half in x]


@pytest.fixture(scope="module")
def measured():
    found = []
    for i in range(MEASUREMENTS):
        gradients, source = measurement(i)
        found.append(level_products(gradients, halves(i), LEVELS, source))
    products, variances = (torch.stack(x) for x in zip(*found, strict=True))
    return products, variances


def test_products_and_variances_are_unbiased_at_two_samples_a_half(measured, z_score):
    products, variances = measured
    means, traces = truth()
    expected = means @ means.mT
    for i in range(1 + LEVELS):
        assert abs(z_score(variances[:, i], float(traces[i]))) < 4
        for j in range(i, 1 + LEVELS):
            assert abs(z_score(products[:, i, j], float(expected[i, j]))) < 4


def test_cosines_and_noise_scales_are_those_of_the_closed_form(measured):
    statistics = SignalStatistics(torch.zeros(LEVELS), "time")
    for products, variances in zip(*measured, strict=True):
        statistics.add(products, variances)
    means, traces = truth()
    unit = means / means.norm(dim=1, keepdim=True)
    for (value, error_), expected in (
        (statistics.cosines, unit @ unit.mT),
        (statistics.noise_scales, traces / means.square().sum(1)),
    ):
        is_known = value.isfinite()
        assert is_known.float().mean() > 0.5
        gap = (value - expected).abs()[is_known]
        assert bool((gap <= 4 * error_[is_known] + 1e-9).all())


def test_one_batch_in_place_of_two_halves_would_make_the_signal_too_large(z_score):
    found = []
    for i in range(100):
        gradients = measurement("same", i)[0]
        batch = halves(i)[0]
        taken = gradients.gradient_between(batch, "one", low=1 / 3, high=2 / 3)
        found.append(taken[0].square().sum())
    mean = truth()[0][2]
    assert z_score(torch.stack(found), float(mean.square().sum())) > 4


def test_a_sketch_keeps_inner_products_on_average(z_score):
    a, b = torch.randn(2, 300, generator=generator("sketch"), dtype=torch.float64)
    b = b + a
    parts = [[x[:100].reshape(10, 10), x[100:]] for x in (a, b)]
    found = []
    for i in range(1000):
        first, second = (sketched(part, 32, generator("sketch", i)) for part in parts)
        found.append(first @ second)
    found, exact = torch.stack(found), a @ b
    assert abs(z_score(found, float(exact))) < 4
    bound = (a.square().sum() * b.square().sum() + exact**2) / 32
    assert 0.5 * bound < found.var() < 1.2 * bound
    assert torch.equal(sketched(parts[0], 300, generator("sketch")), a)


def test_sketched_gradients_give_the_same_products_on_average(measured, z_score):
    found = []
    for i in range(60):
        gradients, source = measurement(i)
        found.append(level_products(gradients, halves(i), 1, source, size=2)[1][0])
    assert abs(z_score(torch.stack(found), float(truth()[1][0]))) < 4


def test_measuring_leaves_weights_gradients_and_random_states():
    gradients, source = measurement("alone")
    module = gradients.loss.module
    before = module.matrix.detach().clone(), torch.get_rng_state()
    level_products(gradients, halves("alone"), LEVELS, source)
    assert torch.equal(module.matrix, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert module.matrix.grad is None


def stepped(module, x0, noise, t):
    """A loss that depends on the bin of t alone, so that draws of ranks do not matter."""
    return error(module, x0, torch.zeros_like(x0), t) * torch.where(t < 1, 1.0, -0.5)


def on_points(points, size):
    loss = GivenLoss(Linear(), stepped, Uniform(0.0, 2.0))
    gradients = GradientMeasurement(loss, measurement("ranks")[1], [0])
    parts = [Clean(half) for half in points]
    return level_products(gradients, parts, 2, measurement("ranks")[1], size)


@pytest.mark.parametrize("size", [3, 4], ids=["sketched", "whole"])
def test_two_ranks_with_half_the_samples_give_what_one_process_gives(on_two_ranks, size):
    points = torch.randn(2, 6, 2, generator=generator("ranks of levels"))

    def half(rank):
        products, variances = on_points(points[:, 3 * rank : 3 * rank + 3], size)
        return {"products": products[1:, 1:], "variances": variances[1:]}

    expected = on_points(points, size)
    for found in on_two_ranks(half):
        torch.testing.assert_close(found["products"], expected[0][1:, 1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["variances"], expected[1][1:], rtol=1e-5, atol=1e-5)
