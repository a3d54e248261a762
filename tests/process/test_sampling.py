import itertools
import math

import pytest
import torch

from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VE, VP, Cosine

STD = 0.6


def gaussian_denoiser(schedule, std=STD):
    """The exact denoiser of data that are normal with standard deviation ``std``."""

    def denoiser(xt, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * xt

    return denoiser


def exact_sample(noise, high, low, std=STD):
    """The ODE's solution from ``high`` to ``low`` in closed form, then one step to x0_hat.

    dz/ds = (z - x0_hat) / s with x0_hat = std² z / (std² + s²) has z ∝ sqrt(std² + s²).
    """
    z = high * noise * math.sqrt((std**2 + low**2) / (std**2 + high**2))
    return std**2 / (std**2 + low**2) * z


def curved_denoiser(z, s):
    """Any smooth function: solvers need not know a data distribution."""
    return torch.tanh(z / (1 + s**2)) + 0.1 * torch.sin(3 * z)


def in_time(schedule):
    def denoiser(xt, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return curved_denoiser(xt / alpha, sigma / alpha)

    return denoiser


def test_heun_is_algorithm_1_of_karras(source):
    schedule, steps = EDM(), 12
    noise = torch.randn(16, 3, generator=source, dtype=torch.float64)

    ends = (80.0 ** (1 / 7), 0.002 ** (1 / 7))
    t = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7 for i in range(steps)] + [0.0]
    x = t[0] * noise
    for i in range(steps):
        d = (x - curved_denoiser(x, t[i])) / t[i]
        next_x = x + (t[i + 1] - t[i]) * d
        if t[i + 1] > 0:
            next_d = (next_x - curved_denoiser(next_x, t[i + 1])) / t[i + 1]
            next_x = x + (t[i + 1] - t[i]) * (d + next_d) / 2
        x = next_x

    sample = Sampler(steps=steps).solve(in_time(schedule), schedule, noise)
    torch.testing.assert_close(sample, x)


@pytest.mark.parametrize("schedule", [VP(), Cosine()], ids=["VP", "Cosine"])
def test_euler_is_ddim(schedule, source):
    noise = torch.randn(16, 3, generator=source, dtype=torch.float64)
    sampler = Sampler(solver="euler", steps=9)
    times = schedule.time(sampler.noise_levels(schedule))

    x = schedule.sigma(times[0]) * noise
    for now, after in itertools.pairwise(times):
        kept, kept_after = schedule.alpha(now) ** 2, schedule.alpha(after) ** 2
        x0 = in_time(schedule)(x, now.expand(16))
        epsilon = (x - kept.sqrt() * x0) / (1 - kept).sqrt()
        x = kept_after.sqrt() * x0 + (1 - kept_after).sqrt() * epsilon
    expected = in_time(schedule)(x, times[-1].expand(16))

    torch.testing.assert_close(sampler.solve(in_time(schedule), schedule, noise), expected)


@pytest.mark.parametrize("grid", ["polynomial", "exponential"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_with_their_order(schedule, solver, order, grid, source):
    noise = torch.randn(8, 2, generator=source, dtype=torch.float64)
    low, high = 0.01, 50.0
    exact = exact_sample(noise, high, low)

    errors = []
    for steps in (161, 321):
        sampler = Sampler(solver, steps, grid, noise_level_min=low, noise_level_max=high)
        sample = sampler.solve(gaussian_denoiser(schedule), schedule, noise)
        errors.append(float((sample - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_samples_of_gaussian_data_have_its_standard_deviation(schedule, source):
    noise = torch.randn(100_000, 1, generator=source)
    least = max(0.002, float(schedule.noise_level(torch.tensor(schedule.t_min))))
    sampler = Sampler(steps=64, noise_level_min=least)
    samples = sampler.solve(gaussian_denoiser(schedule), schedule, noise)
    # four standard errors of a standard deviation, and the solver's own error
    assert float(samples.std()) == pytest.approx(STD, abs=STD * (4 / math.sqrt(2e5) + 2e-3))
    assert samples.dtype == torch.float32


@pytest.mark.parametrize("grid", ["polynomial", "exponential"])
def test_grids_fall_between_their_ends(schedule, grid):
    sampler = Sampler(steps=7, grid=grid, noise_level_min=0.03, noise_level_max=30.0)
    levels = sampler.noise_levels(schedule)
    assert len(levels) == 7
    assert (levels.diff() < 0).all()
    torch.testing.assert_close(levels[[0, -1]], torch.tensor([30.0, 0.03], dtype=torch.float64))


def test_the_polynomial_grid_is_equally_spaced_in_the_root():
    levels = Sampler(steps=9, rho=3.0).noise_levels(EDM()) ** (1 / 3)
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(8))


def test_the_exponential_grid_has_equal_ratios():
    levels = Sampler(steps=9, grid="exponential").noise_levels(VE()).log()
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(8))


def test_grids_take_the_ends_of_the_schedule_by_default(schedule):
    levels = Sampler().noise_levels(schedule)
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    expected = schedule.noise_level(ends).clamp(max=1000)
    torch.testing.assert_close(levels[[0, -1]], expected)


@pytest.mark.parametrize(("solver", "evaluations"), [("heun", 35), ("euler", 18)])
def test_the_number_of_network_evaluations_is_the_stated_one(solver, evaluations):
    calls = []

    def denoiser(xt, t):
        calls.append(t)
        assert xt.dtype == t.dtype == torch.float32
        return xt

    Sampler(solver).solve(denoiser, EDM(), torch.ones(2, 3))
    assert len(calls) == evaluations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "`solver` must be 'heun' or 'euler', got 'rk4'"),
        ({"grid": "linear"}, "`grid` must be 'polynomial' or .* got 'linear'"),
        ({"steps": 1}, "`steps` must be at least 2, got 1"),
        ({"rho": 0.0}, "`rho` must be positive and finite, got 0.0"),
        ({"guidance": -1.0}, "`guidance` must be at least 0, got -1.0"),
        ({"guidance": math.nan}, "`guidance` must be at least 0, got nan"),
        ({"guidance": math.inf}, "`guidance` must be finite, got inf"),
        ({"noise_level_min": 0.0}, "0 < min < max, got 0 and 80"),
        ({"noise_level_min": 2.0, "noise_level_max": 1.0}, "0 < min < max, got 2 and 1"),
    ],
)
def test_invalid_samplers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options).noise_levels(EDM())
