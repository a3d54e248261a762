import math

import numpy
import pytest
import torch

from lightning_vr.timesteps import LogitNormal, LogNormal, LogUniform, Uniform, UniformSteps

DENSITIES = [
    Uniform(0.1, 0.7),
    LogUniform(0.02, 100.0),
    LogNormal(-1.2, 1.2),
    LogNormal(0.5, 0.1),
    LogitNormal(0.0, 1.0),
    LogitNormal(-0.6, 1.4),
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
def test_the_log_density_keeps_the_dtype_and_is_minus_infinity_off_the_support(density, dtype):
    bounded = isinstance(density, (Uniform, LogitNormal))
    off = torch.tensor([-1.0, 0.0, 1.0] if bounded else [-1.0, 0.0], dtype=dtype)
    log_prob = density.log_prob(off)
    assert log_prob.dtype == dtype
    assert log_prob.tolist() == [-math.inf] * len(off)


def test_edm_times_have_the_published_tail():
    t = LogNormal(-1.2, 1.2)(torch.linspace(0.00005, 0.99995, 10_000, dtype=torch.float64))
    shares = [float((t > level).double().mean()) for level in (1, 2, 3, 5)]
    assert shares == pytest.approx([0.159, 0.057, 0.028, 0.010], abs=0.0006)


def test_uniform_steps_are_equally_likely():
    density = UniformSteps(7)
    u = (torch.arange(7000, dtype=torch.float64) + 0.5) / 7000
    assert torch.equal(torch.bincount(density(u).long()), torch.full((7,), 1000))
    assert float(density.log_prob(torch.arange(7.0)).exp().sum()) == pytest.approx(1)
    assert density.log_prob(torch.tensor([-1.0, 0.5, 7.0])).tolist() == [-math.inf] * 3
    assert float(density(torch.tensor(1 - 2.0**-53, dtype=torch.float64))) == 6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Uniform(1.0, 0.5), "finite with low < high, but got low=1.0 and high=0.5"),
        (lambda: Uniform(0.0, math.inf), "finite with low < high"),
        (lambda: LogUniform(0.0, 1.0), "`low` expected to be positive, but got 0.0"),
        (lambda: LogNormal(std=0.0), "`std` expected to be positive, but got 0.0"),
        (lambda: LogitNormal(std=math.nan), "`std` expected to be positive, but got nan"),
        (lambda: UniformSteps(0), "`steps` expected to be at least 1, but got 0"),
    ],
)
def test_densities_that_mean_nothing_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
