"""Excess loss against exact denoisers, known offsets, closed forms and second formulas."""

import math

import pytest
import torch
from support.covering_arrays import covering_array

from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import noise_samples
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import EDM, VP, RectifiedFlow
from lightning_vr.process.weightings import MinSNRWeighting, UnitWeighting
from lightning_vr.variance.excess_loss import ExcessLoss
from lightning_vr.variance.irreducible_variance import IrreducibleVariance
from lightning_vr.variance.target_curves import MeasuredCurve, TargetVarianceCurve
from lightning_vr.variance.target_measurement import measure_target_variance, noise_level_grid

LIMIT = 4.0
"""Standard errors that a statistical test allows."""

STEPS, BATCH = 120, 192


@pytest.fixture(scope="module")
def cloud():
    return torch.randn(12, 2, generator=torch.Generator().manual_seed(5)).double()


@pytest.fixture(scope="module")
def curve(cloud):
    levels = noise_level_grid(cloud, 0.02, 20.0, 16)
    return measure_target_variance(cloud, levels, [3, 12], samples=16384, blocks=1024)


def two_point_variance(levels):
    """E (1 - tanh²(x_t / s²)), x_t = 1 + s Z, by the trapezoidal rule: V_DSM for x0 = ±1."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    s = levels[:, None]
    return torch.trapezoid((1 - torch.tanh((1 + s * z) / s**2) ** 2) * density, z)


def curve_of(levels, dsm, stf=None, error=0.0):
    """A curve whose variances in x0 space are given."""

    def measured(values):
        return MeasuredCurve(values / levels**4, error * values / levels**4)

    nothing = MeasuredCurve(torch.zeros_like(levels), torch.zeros_like(levels))
    others = {2: measured(dsm if stf is None else stf)}
    return TargetVarianceCurve(levels, 9, measured(dsm), others, {}, nothing)


def two_points(error=0.0):
    levels = torch.logspace(math.log10(0.2), 1.3, 20, dtype=torch.float64)
    return curve_of(levels, two_point_variance(levels), error=error)


def random_draws(seed, count=60):
    """Noise levels on and off the grid, losses and scales."""
    source = torch.Generator().manual_seed(seed)
    level = torch.exp(2 * torch.randn(count, generator=source))
    return level, torch.rand(count, generator=source), torch.rand(count, generator=source)


def losses_of(denoiser, cloud, target, schedule, kind, weighting, seed=0):
    """Yield the training losses of a network whose x0_hat is ``denoiser(noised)``."""
    source = torch.Generator().manual_seed(seed)

    def network(_, noised):
        coefficients = prediction(kind, schedule, noised.t)
        shifted = denoiser(noised) - coefficients.a[:, None] * noised.xt
        return shifted / coefficients.b[:, None]

    for _ in range(STEPS):
        index = torch.randint(len(cloud), (BATCH,), generator=source)
        clean = Clean(cloud[index], index=index)
        t = schedule.time(torch.exp(-0.3 + 1.5 * torch.randn(BATCH, generator=source).double()))
        weight = torch.randint(1, 4, (BATCH,), generator=source).double()
        noised = noise_samples(clean, schedule, t, weight, source)
        estimate = target(noised, clean, source)
        objective = Objective(schedule, schedule.default_timesteps(), weighting, kind)
        yield diffusion_loss(network, noised, estimate, objective=objective)


SETTINGS = {
    "edm": (EDM(), "edm", UnitWeighting("edm")),
    "vp-epsilon": (VP(), "epsilon", UnitWeighting("epsilon")),
    "vp-v": (VP(), "v", MinSNRWeighting()),
    "flow-velocity": (RectifiedFlow(), "velocity", UnitWeighting("x0")),
}
TARGETS = {"dsm": None, "stf": 3, "all": "all"}
OFFSETS = {"exact": (0.0, 0.0), "offset": (0.3, -0.4)}
CASES = {"offset": [*OFFSETS], "target": [*TARGETS], "settings": [*SETTINGS]}


def some_cases(strength):
    """Cases in which each combination of so many of their factors occurs."""
    rows = covering_array(CASES, strength, lambda _: True)
    return pytest.mark.parametrize(list(CASES), [tuple(row.values()) for row in rows])


def sums(cloud, curve, references, offset, schedule, kind, weighting):
    """Return excess loss of the exact denoiser plus an offset, and what it should be.

    The offset falls with the noise level, as its weighted square would be all in the lowest else.
    """
    target = DSM() if references is None else STF(references)
    target.fill(cloud, None, indexed=True)

    def denoiser(noised):
        mean = posterior_mean(noised.xt, noised.alpha, noised.sigma, cloud).mean
        return mean + noised.noise_level.clamp(max=1)[:, None] * offset

    own = {None: None, 3: 3, "all": len(cloud)}[references]
    excess = ExcessLoss(IrreducibleVariance(curve, own))
    expected = ExcessLoss(IrreducibleVariance(curve, len(cloud)))
    for estimate in losses_of(denoiser, cloud, target, schedule, kind, weighting):
        noised = estimate.noised
        scale = noised.weight * weighting(schedule, noised.t) / cloud.shape[1]
        excess.add(noised.noise_level, estimate.per_draw, scale)
        square = noised.noise_level.clamp(max=1) ** 2 * offset.square().sum()
        expected.add(noised.noise_level, scale * square, scale)
    excess.advance()
    expected.advance()
    return excess, expected


@some_cases(2)
def test_the_excess_of_an_exact_denoiser_is_0_and_an_offset_adds_its_square(
    cloud, curve, offset, target, settings
):
    check_excess(cloud, curve, OFFSETS[offset], TARGETS[target], SETTINGS[settings])


@pytest.mark.slow
@some_cases(3)
def test_the_excess_is_right_for_every_target_and_objective(cloud, curve, offset, target, settings):
    check_excess(cloud, curve, OFFSETS[offset], TARGETS[target], SETTINGS[settings])


def check_excess(cloud, curve, offset, references, settings):
    offset = torch.tensor(offset, dtype=torch.float64)
    found, expected = sums(cloud, curve, references, offset, *settings)
    for parts, truth in [
        (found.by_level(), expected.by_level().loss),
        (found.total(), expected.total().loss),
    ]:
        assert (
            (parts.excess - truth).abs() < LIMIT * parts.excess_error + 1e-9 * (1 + truth)
        ).all()
    total = found.total()
    assert float(total.excess_error) < 0.04 * float(total.loss) + 1e-9
    if references == "all":
        assert not found.by_level().irreducible.any()
    else:
        assert float(total.irreducible) > 5 * float(total.excess_error)


def test_the_total_is_the_mean_over_every_draw_on_the_grid_or_off_it():
    variance = IrreducibleVariance(two_points())
    excess = ExcessLoss(variance)
    steps = [random_draws(seed) for seed in range(3)]
    for step in steps:
        excess.add(*step)
    excess.advance()

    level, loss, scale = (torch.cat(parts).double() for parts in zip(*steps, strict=True))
    assert float(level.min()) < 0.1 * float(variance.noise_levels[0])
    assert float(level.max()) > 2 * float(variance.noise_levels[-1])
    total, parts = excess.total(), excess.by_level()
    irreducible = (scale * variance(level).mean).mean()
    torch.testing.assert_close(total.loss, loss.mean())
    torch.testing.assert_close(total.irreducible, irreducible)
    torch.testing.assert_close(total.excess, loss.mean() - irreducible)
    assert float(total.draws) == float(parts.draws.sum()) == len(level)
    seen = parts.draws > 0
    torch.testing.assert_close((parts.loss * parts.draws)[seen].sum(), loss.sum())


def test_draws_count_at_the_noise_level_next_to_them():
    excess = ExcessLoss(IrreducibleVariance(two_points()))
    excess.add(excess.noise_levels[3:5] * 1.05, torch.tensor([2.0, 3.0]), torch.zeros(2))
    excess.advance()
    parts = excess.by_level()
    assert parts.draws.tolist() == [0, 0, 0, 1, 1] + 15 * [0]
    assert parts.loss[3:5].tolist() == [2.0, 3.0]
    assert parts.loss[[0, 19]].isnan().all()


def test_older_losses_fade_as_ratios_of_faded_sums():
    excess = ExcessLoss(IrreducibleVariance(two_points()))
    level = torch.ones(4)
    for count, loss in [(4, 1.0), (1, 2.0), (2, 3.0)]:
        excess.add(level[:count], torch.full((count,), loss), torch.zeros(count))
        excess.advance()
    weights = torch.tensor([0.64 * 4, 0.8 * 1, 2.0], dtype=torch.float64)
    expected = weights @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / weights.sum()
    torch.testing.assert_close(excess.total().loss, expected)
    torch.testing.assert_close(excess.total().draws, weights.sum())

    for _ in range(60):
        excess.add(level, torch.full((4,), 7.0), torch.zeros(4))
        excess.advance()
    torch.testing.assert_close(float(excess.total().loss), 7.0, rtol=1e-5, atol=0)


def test_draws_of_one_step_count_as_one_in_the_standard_error():
    """Draws that share references share their error: the error is that of the steps' means."""
    excess = ExcessLoss(IrreducibleVariance(two_points()))
    steps = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    for value in steps:
        excess.add(torch.ones(8), value.expand(8), torch.zeros(8))
    excess.advance()
    expected = steps.std() / 30**0.5
    torch.testing.assert_close(excess.total().excess_error, expected)
    level = int((excess.noise_levels - 1).abs().argmin())
    torch.testing.assert_close(excess.by_level().excess_error[level], expected)


def test_faded_steps_have_the_standard_error_of_a_weighted_mean():
    """Independent trials: the spread of the faded mean is what its standard error says."""
    source = torch.Generator().manual_seed(1)
    means, errors = [], []
    for _ in range(200):
        excess = ExcessLoss(IrreducibleVariance(two_points()))
        for _ in range(30):
            excess.add(torch.ones(2), torch.randn(2, generator=source), torch.zeros(2))
            excess.advance()
        means.append(excess.total().excess)
        errors.append(excess.total().excess_error)
    claimed = torch.stack(errors).square().mean().sqrt()
    observed = torch.stack(means).square().mean().sqrt()
    # a standard deviation from 200 trials has a relative standard error of 5 %
    assert abs(float(claimed / observed) - 1) < LIMIT * 0.05


def test_a_single_step_has_no_standard_error():
    excess = ExcessLoss(IrreducibleVariance(two_points()))
    excess.add(*random_draws(0))
    excess.advance()
    assert bool(excess.total().excess_error.isnan())


def test_the_error_of_the_measured_variance_stays_however_many_draws_there_are():
    excess = ExcessLoss(IrreducibleVariance(two_points(error=0.1)))
    for _ in range(2):
        excess.add(torch.full((1000,), 20.0), torch.ones(1000), torch.ones(1000))
    excess.advance()
    expected = 0.1 * two_points().in_x0_space(two_points().dsm).mean[-1]
    torch.testing.assert_close(excess.total().excess_error, expected, rtol=1e-3, atol=0)


def test_a_state_goes_on_with_identical_numbers(tmp_path):
    variance = IrreducibleVariance(two_points(error=0.1))
    unbroken = ExcessLoss(variance)
    for seed in range(4):
        unbroken.add(*random_draws(seed))
        if seed < 2:
            unbroken.advance()
    torch.save(unbroken.state(), tmp_path / "state.pt")
    resumed = ExcessLoss(variance, torch.load(tmp_path / "state.pt", weights_only=True))
    for excess in (unbroken, resumed):
        excess.add(*random_draws(4))
        excess.advance()
    for found, expected in zip(resumed.by_level(), unbroken.by_level(), strict=True):
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
    assert resumed.total() == unbroken.total()


def test_between_noise_levels_the_variance_is_the_closed_form():
    variance = IrreducibleVariance(two_points())
    levels = torch.logspace(math.log10(0.25), 1.3, 500, dtype=torch.float64)
    found, expected = variance(levels).mean, two_point_variance(levels)
    assert ((found / expected - 1).abs()[expected > 1e-3] < 0.04).all()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    # straight lines between the nodes are ten times as far off
    grid = variance.noise_levels
    cell = (torch.bucketize(levels, grid) - 1).clamp(0, 18)
    share = (levels / grid[cell]).log() / (grid[1] / grid[0]).log()
    straight = torch.lerp(two_point_variance(grid)[cell], two_point_variance(grid)[cell + 1], share)
    assert float((straight - expected).abs().max()) > 10 * float((found - expected).abs().max())


def test_off_the_grid_the_variance_falls_to_0_below_and_is_constant_above():
    variance = IrreducibleVariance(two_points(error=0.1))
    ends = variance.noise_levels[[0, -1]]
    below = torch.cat([torch.zeros(1), ends[0] * torch.logspace(-4, 0, 50)]).double()
    found = variance(below)
    assert (found.mean >= 0).all()
    assert (found.mean.diff() >= 0).all()
    assert float(found.mean[0]) == float(found.error[0]) == 0
    # unit weight on epsilon divides by s²
    weighted = found.mean[1:] / below[1:] ** 2
    assert float(weighted.max()) <= 1.001 * float(variance(ends).mean[0] / ends[0] ** 2)
    above = variance(torch.tensor([float(ends[1]), 40.0, 1e9, math.inf], dtype=torch.float64))
    torch.testing.assert_close(above.mean, above.mean[:1].expand(4))
    torch.testing.assert_close(above.error, 0.1 * above.mean, rtol=1e-3, atol=0)


def test_a_variance_with_zeros_and_noise_is_never_negative():
    levels = torch.logspace(-1, 1, 12, dtype=torch.float64)
    noisy = torch.tensor([0, 0, 1e-9, -1e-3, 0.2, 0.1, 0.5, 0.4, -0.1, 0, 0.3, 0.2]).double()
    variance = IrreducibleVariance(curve_of(levels, torch.ones(12).double(), noisy), 2)
    found = variance(torch.logspace(-3, 3, 2000, dtype=torch.float64)).mean
    assert (found >= 0).all()
    assert float(found.max()) <= 0.5 + 1e-9
    torch.testing.assert_close(variance(levels).mean, noisy.clamp(min=0))


def test_a_single_sample_has_no_irreducible_loss():
    levels = torch.logspace(-1, 1, 5, dtype=torch.float64)
    variance = IrreducibleVariance(curve_of(levels, torch.zeros(5).double()))
    assert not variance(levels).mean.any()


def test_below_the_switch_the_variance_is_that_of_dsm(curve):
    levels = torch.tensor([0.3, 0.79, 0.81, 3.0], dtype=torch.float64)
    switched = IrreducibleVariance(curve, 3, switch=0.8)(levels)
    for plain, rows in [
        (IrreducibleVariance(curve), [0, 1]),
        (IrreducibleVariance(curve, 3), [2, 3]),
    ]:
        for found, expected in zip(switched, plain(levels), strict=True):
            assert torch.equal(found[rows], expected[rows])
    assert float(switched.mean[1]) > 1.1 * float(IrreducibleVariance(curve, 3)(levels).mean[1])
