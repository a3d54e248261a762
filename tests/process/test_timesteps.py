import math

import numpy
import pytest
import torch

from lightning_vr.process.timesteps import (
    LogitNormal,
    LogNormal,
    LogUniform,
    Shifted,
    Truncated,
    Uniform,
    UniformSteps,
)

DENSITIES = [
    Uniform(0.1, 0.7),
    LogUniform(0.02, 100.0),
    LogNormal(-1.2, 1.2),
    LogNormal(0.5, 0.1),
    LogitNormal(0.0, 1.0),
    LogitNormal(-0.6, 1.4),
    Shifted(Uniform(0.001, 0.999), 3.0, 1000.0),
    Shifted(LogitNormal(), 0.3),
]
continuous = pytest.mark.parametrize("density", DENSITIES, ids=lambda d: type(d).__name__)


def integral(density, ends):
    """The integral of the density between neighbouring ends, by Gauss-Legendre."""
    nodes, weights = (torch.from_numpy(x) for x in numpy.polynomial.legendre.leggauss(24))
    low, half = ends[:-1, None], 0.5 * ends.diff()[:, None]
    return (half * weights * density.log_prob(low + half * (nodes + 1)).exp()).sum(1)


@continuous
def test_icdf_inverts_the_integral_of_the_density(density):
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(integral(density, density(u)), u.diff(), rtol=1e-8, atol=0)


@continuous
def test_densities_integrate_to_one(density):
    tail = torch.logspace(-12, -1, 100, dtype=torch.float64)
    u = torch.cat([tail, torch.linspace(0.11, 0.89, 300, dtype=torch.float64), 1 - tail.flip(0)])
    assert float(integral(density, density(u)).sum()) == pytest.approx(1, abs=1e-8)


@continuous
@pytest.mark.parametrize("u", [2.0**-54, 1 - 2.0**-53])
def test_times_at_the_ends_of_the_unit_interval_are_finite(density, u):
    t = density(torch.tensor([u], dtype=torch.float64)).float()
    assert torch.isfinite(t).all()
    assert (t > 0).all()


@continuous
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_density_keeps_the_dtype_and_is_minus_infinity_outside_the_support(density, dtype):
    end = 1000.0 if getattr(density, "end", 1.0) == 1000.0 else 1.0
    bounded = isinstance(density, (Uniform, LogitNormal, Shifted))
    off = torch.tensor([-end, 0.0, end, 2 * end] if bounded else [-1.0, 0.0], dtype=dtype)
    log_prob = density.log_prob(off)
    assert log_prob.dtype == dtype
    assert log_prob.tolist() == [-math.inf] * len(off)


def test_edm_times_have_the_published_tail():
    t = LogNormal(-1.2, 1.2)(torch.linspace(0.00005, 0.99995, 10_000, dtype=torch.float64))
    shares = [float((t > level).double().mean()) for level in (1, 2, 3, 5)]
    assert shares == pytest.approx([0.159, 0.057, 0.028, 0.010], abs=0.0006)


def test_a_shift_multiplies_the_noise_level_of_rectified_flow():
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    plain, shifted = Shifted(Uniform())(t), Shifted(Uniform(), shift=3.0, end=1000.0)(t) / 1000
    assert torch.equal(plain, t)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t))


def test_uniform_steps_are_equally_likely():
    density = UniformSteps(7)
    u = (torch.arange(7000, dtype=torch.float64) + 0.5) / 7000
    assert torch.equal(torch.bincount(density(u).long()), torch.full((7,), 1000))
    assert float(density.log_prob(torch.arange(7.0)).exp().sum()) == pytest.approx(1)
    assert density.log_prob(torch.tensor([-1.0, 0.5, 7.0])).tolist() == [-math.inf] * 3
    assert float(density(torch.tensor(1 - 2.0**-53, dtype=torch.float64))) == 6


BINS = [(0.0, 1.0), (0.0, 0.125), (0.3, 0.55), (0.875, 1.0)]
bins = pytest.mark.parametrize(("low", "high"), BINS)


@continuous
@bins
def test_a_truncated_density_lies_between_its_quantiles(density, low, high):
    part = Truncated(density, low, high)
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(part(u), density(low + (high - low) * u))
    torch.testing.assert_close(integral(part, part(u)), u.diff(), rtol=1e-7, atol=0)


@bins
def test_a_part_of_a_uniform_density_is_uniform(low, high):
    part, expected = Uniform(0.3, 1.7).between(low, high), Truncated(Uniform(0.3, 1.7), low, high)
    assert isinstance(part, Uniform)
    u, t = (torch.linspace(*ends, 400, dtype=torch.float64) for ends in ((0, 0.999), (0.2, 1.8)))
    torch.testing.assert_close(part(u), expected(u))
    torch.testing.assert_close(part.cdf(t), expected.cdf(t))
    torch.testing.assert_close(part.log_prob(t), expected.log_prob(t))


@continuous
@bins
def test_a_truncated_density_integrates_to_one_and_is_zero_elsewhere(density, low, high):
    part = Truncated(density, low, high)
    tail = torch.logspace(-12, -1, 100, dtype=torch.float64)
    u = torch.cat([tail, torch.linspace(0.11, 0.89, 300, dtype=torch.float64), 1 - tail.flip(0)])
    assert float(integral(part, part(u)).sum()) == pytest.approx(1, abs=1e-8)

    outside = [q for q in (low - 0.01, high + 0.01) if 0 < q < 1]
    off = density(torch.tensor(outside, dtype=torch.float64))
    assert part.log_prob(off).tolist() == [-math.inf] * len(outside)
    torch.testing.assert_close(
        part.log_prob(part(u)), density.log_prob(part(u)) - math.log(high - low)
    )


@continuous
@bins
def test_the_cdf_inverts_the_icdf(density, low, high):
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    for part in (density, Truncated(density, low, high)):
        torch.testing.assert_close(part.cdf(part(u)), u, rtol=1e-9, atol=1e-11)


@continuous
@bins
def test_the_cdf_is_zero_below_the_support_and_one_above(density, low, high):
    part = Truncated(density, low, high)
    outside = torch.tensor([0.5 * low, 0.5 + 0.5 * high], dtype=torch.float64)
    below, above = part.cdf(density(outside)).tolist()
    assert below == 0 or low == 0
    assert above == 1 or high == 1


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_the_cdf_of_a_step_is_the_middle_of_its_cell(steps):
    density, t = UniformSteps(steps), torch.arange(steps, dtype=torch.float64)
    edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(density.cdf(t), 0.5 * (edges[1:] + edges[:-1]))
    assert torch.equal(density(density.cdf(t)), t)


@continuous
def test_all_bins_together_are_the_whole(density):
    """Times drawn in turn from equally likely bins are those of the density itself."""
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    parts = [Truncated(density, i / 8, (i + 1) / 8) for i in range(8)]
    whole = density((torch.arange(800, dtype=torch.float64) + 0.5) / 800)
    torch.testing.assert_close(torch.cat([part(u) for part in parts]), whole)

    t = density(torch.linspace(0.0011, 0.9991, 333, dtype=torch.float64))
    mixture = sum(part.log_prob(t).exp() / 8 for part in parts)
    torch.testing.assert_close(mixture, density.log_prob(t).exp())


@continuous
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_truncated_log_density_keeps_the_dtype(density, dtype):
    t = Truncated(density, 0.25, 0.5)(torch.tensor([0.5], dtype=torch.float64)).to(dtype)
    log_prob = Truncated(density, 0.25, 0.5).log_prob(t)
    assert log_prob.dtype == dtype
    assert log_prob.isfinite().all()


def test_bins_of_steps_hold_their_own_steps_and_all_of_them_once():
    density = UniformSteps(8)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for i in range(4):
        t = Truncated(density, i / 4, (i + 1) / 4)(u)
        assert t.unique().tolist() == [2 * i, 2 * i + 1]
        assert float((t == 2 * i).double().mean()) == 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Uniform(1.0, 0.5), "finite with low < high, got 1.0 and 0.5"),
        (lambda: Uniform(0.0, math.inf), "finite with low < high"),
        (lambda: LogUniform(0.0, 1.0), "`low` must be positive and finite, got 0.0"),
        (lambda: LogNormal(std=0.0), "`std` must be positive and finite, got 0.0"),
        (
            lambda: LogitNormal(std=math.nan),
            "`std` must be positive and finite, got nan",
        ),
        (lambda: Shifted(Uniform(), 0.0), "`shift` must be positive and finite, got 0.0"),
        (lambda: Shifted(Uniform(), end=0.0), "`end` must be positive and finite, got 0.0"),
        (lambda: Shifted(LogNormal()), "`density` .* between 0 and 1, got LogNormal, .*Uniform()"),
        (lambda: UniformSteps(0), "`timesteps` must be at least 1, got 0"),
        (lambda: Truncated(Uniform(), 0.5, 0.5), "0 <= low < high <= 1, got 0.5 and 0.5"),
        (lambda: Truncated(Uniform(), -0.1, 0.5), "0 <= low < high <= 1"),
        (lambda: Truncated(Uniform(), 0.5, 1.1), "0 <= low < high <= 1"),
        (lambda: Truncated(Uniform(), math.nan, 1.0), "0 <= low < high <= 1"),
    ],
)
def test_invalid_densities_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()
