import itertools
import math

import pytest
import torch
from support.denoisers import gaussian_denoiser

from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VE, VP, Cosine
from lightning_vr.process.solvers import RK45, Euler, Heun

STD = 0.6


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
    sampler = Sampler(Euler(), steps=9)
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
@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2)])
def test_solvers_converge_with_their_order(schedule, solver, order, grid, source):
    noise = torch.randn(8, 2, generator=source, dtype=torch.float64)
    low, high = 0.01, 50.0
    exact = exact_sample(noise, high, low)

    errors = []
    for steps in (161, 321):
        sampler = Sampler(solver, steps, grid, noise_level_min=low, noise_level_max=high)
        sample = sampler.solve(gaussian_denoiser(schedule, STD), schedule, noise)
        errors.append(float((sample - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_samples_of_gaussian_data_have_its_standard_deviation(schedule, source):
    noise = torch.randn(100_000, 1, generator=source)
    least = max(0.002, float(schedule.noise_level(torch.tensor(schedule.t_min))))
    sampler = Sampler(steps=64, noise_level_min=least)
    samples = sampler.solve(gaussian_denoiser(schedule, STD), schedule, noise)
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


def test_a_grid_may_be_given(source):
    noise = torch.randn(4, 2, generator=source)
    usual = Sampler(steps=6, noise_level_min=0.02)
    levels = usual.noise_levels(VP()).tolist()
    own = Sampler(grid=levels)
    assert own.noise_levels(VP()).tolist() == levels
    assert own.evaluations == usual.evaluations == 11
    denoiser = in_time(VP())
    found = [sampler.solve(denoiser, VP(), noise) for sampler in (usual, own)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(Sampler(), 35), (Sampler(Euler()), 18), (Sampler(Euler(), 7), 7), (Sampler(RK45()), None)],
)
def test_the_number_of_network_evaluations_is_known_beforehand(sampler, evaluations):
    assert sampler.evaluations == evaluations


def test_the_progress_bar_counts_evaluations(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, items, title, total, **_):
            self.title, self.total, self.count = title, total, 0
            bars.append(self)

        def update(self):
            self.count += 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("lightning_vr.core.progress.tqdm", Bar)
    for solver, total in ((Heun(), 3 * 7), (RK45(1e-2, 1e-2), None)):
        sampler = Sampler(solver, None if total is None else 4)
        drawn = sampler.draw(
            lambda xt, t, group, cond: xt / 2, EDM(), torch.ones(5, 1), batch_size=2, progress=True
        )
        assert (bars[-1].title, bars[-1].total) == ("Sampling", total)
        assert drawn.evaluations * 3 >= bars[-1].count > 0
    assert bars[0].count == 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "`solver` must be an object of the class Solver, got 'rk4'"),
        ({"grid": [1.0]}, r"`grid` must be .* two or more decreasing noise levels .* got \[1.0\]"),
        ({"grid": [1.0, 2.0]}, r"decreasing noise levels above 0, got \[1.0, 2.0\]"),
        ({"grid": [2.0, 1.0, 0.0]}, "got .* leave out the final 0"),
        ({"grid": [90.0, 1.0]}, "levels of `grid` must lie between 0.002 and 80, .* got 1 and 90"),
        ({"grid": [9.0, 1.0], "steps": 2}, "`steps` must be left out where `grid` gives"),
        ({"grid": "linear"}, "`grid` must be 'polynomial' or .* got 'linear'"),
        ({"steps": 1}, "`steps` must be at least 2, got 1"),
        ({"rho": 0.0}, "`rho` must be positive and finite, got 0.0"),
        ({"noise_level_min": 0.0}, "0 < min < max, got 0 and 80"),
        ({"noise_level_min": 2.0, "noise_level_max": 1.0}, "0 < min < max, got 2 and 1"),
    ],
)
def test_invalid_samplers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options).noise_levels(EDM())
