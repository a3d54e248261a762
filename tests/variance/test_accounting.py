"""Costs, the best number of resamples and savings against brute force and closed forms."""

import math
import random

import pytest
import torch

from lightning_vr.variance.accounting import (
    CostModel,
    best_resamples,
    effective_compute_multiplier,
    noise_ratio,
    relative_efficiency,
    steps_ratio,
    variance_times_cost,
)
from lightning_vr.variance.bootstrap import Interval, bootstrap, ratio

GRID = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 4)]
"""Numbers of samples and of resamples that determine a cost model."""

LIMIT = 4.0
"""Standard errors that a statistical test allows."""


def fit(seconds, grid=GRID):
    return CostModel.fit([r for r, _ in grid], [k for _, k in grid], seconds)


def relative_residuals(model, seconds, grid=GRID):
    return [model.seconds(r, k) / t - 1 for (r, k), t in zip(grid, seconds, strict=True)]


def log_uniform(source, decades=2.0):
    return 10 ** source.uniform(-decades, decades)


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("truth", [(0.01, 0.3, 0.05), (0.0, 2e-4, 7e-5), (5.0, 0.0, 1e-3)])
@pytest.mark.parametrize("grid", [GRID, [(1, 1), (1, 8), (512, 3)]], ids=["five", "three"])
def test_a_cost_model_is_recovered_from_its_own_times(truth, grid):
    model = fit([truth[0] + r * truth[1] + r * k * truth[2] for r, k in grid], grid)
    assert (model.fixed, model.upstream, model.denoise) == pytest.approx(truth, rel=1e-9, abs=1e-12)
    assert model.misfit < 1e-12
    assert model.seconds(7, 3) == pytest.approx(truth[0] + 7 * truth[1] + 21 * truth[2])


def test_the_fit_is_the_least_squares_of_relative_residuals_without_negative_costs():
    """Karush-Kuhn-Tucker: no slope along positive coefficients, an upward one along those at 0."""
    source, at_zero = random.Random(0), 0
    for _ in range(200):
        seconds = [log_uniform(source) for _ in GRID]
        model = fit(seconds)
        coefficients = (model.fixed, model.upstream, model.denoise)
        residuals = relative_residuals(model, seconds)
        for coefficient, unit in zip(coefficients, ((1, 0, 0), (0, 1, 0), (0, 0, 1)), strict=True):
            column = [CostModel(*unit).seconds(r, k) for r, k in GRID]
            terms = [a / t * e for a, t, e in zip(column, seconds, residuals, strict=True)]
            slope = sum(terms) / math.hypot(*(a / t for a, t in zip(column, seconds, strict=True)))
            assert coefficient >= 0
            assert slope > -1e-9
            assert slope < 1e-9 or coefficient == 0
            at_zero += coefficient == 0
    assert at_zero > 50


def test_long_runs_do_not_drown_the_cost_of_short_ones():
    """10 % off on the longest run, more than all short ones take: these keep 5 % or better."""
    grid = [*GRID, (64, 64)]
    seconds = [0.1 + 0.1 * r + 0.01 * r * k for r, k in grid]
    model = fit([*seconds[:-1], 1.1 * seconds[-1]], grid)
    assert 0.1 * seconds[-1] > sum(seconds[:-1])
    assert max(map(abs, relative_residuals(model, seconds[:-1]))) < 0.05


def test_misfit_is_the_largest_relative_residual():
    """A denoiser that fills the device better as the batch grows: T falls short of linear in K."""
    grid = [(r, k) for r in (1, 2, 4) for k in (1, 4, 16)]
    seconds = [0.02 + 0.1 * r + 0.05 * (r * k) ** 0.6 for r, k in grid]
    model = fit(seconds, grid)
    assert model.misfit == pytest.approx(max(map(abs, relative_residuals(model, seconds, grid))))
    assert model.misfit > 0.05


def test_best_resamples_is_what_brute_force_finds():
    source, seen = random.Random(1), set()
    for _ in range(2000):
        between, within = log_uniform(source), log_uniform(source)
        cost = CostModel(log_uniform(source), log_uniform(source), log_uniform(source))
        products = [variance_times_cost(between, within, cost, k) for k in range(1, 65)]
        best = best_resamples(between, within, cost)
        assert products[best - 1] <= min(products) * (1 + 1e-12)
        seen.add(best)
    assert {1, 2, 3, 4, 5, 64} <= seen


def test_of_two_equal_numbers_of_resamples_the_smaller_is_best():
    """K (K + 1) = K*² exactly: H(2) = H(3)."""
    cost = CostModel(0.0, 6.0, 1.0)
    assert variance_times_cost(1, 1, cost, 2) == variance_times_cost(1, 1, cost, 3)
    assert best_resamples(1, 1, cost) == 2
    assert best_resamples(1, 1.0001, cost) == 3


@pytest.mark.parametrize(("factor", "bound"), [(2, 1.125), (4, 1.5625)])
def test_resamples_that_are_off_by_a_factor_cost_little(factor, bound):
    assert bound == (2 + factor + 1 / factor) / 4
    source, worst = random.Random(2), 0.0
    for _ in range(1000):
        between, within = log_uniform(source), log_uniform(source)
        cost = CostModel(0.0, log_uniform(source), log_uniform(source))
        optimum = math.sqrt(within / between * cost.upstream / cost.denoise)
        least = variance_times_cost(between, within, cost, optimum)
        assert least == pytest.approx(
            (math.sqrt(between * cost.upstream) + math.sqrt(within * cost.denoise)) ** 2
        )
        for off in (factor * optimum, optimum / factor):
            worst = max(worst, variance_times_cost(between, within, cost, off) / least)
    # reached where V_B upstream = V_W denoise
    assert 0.99 * bound < worst <= bound * (1 + 1e-12)


def test_the_published_savings_follow_from_two_ratios():
    """Upstream costs 9 denoisings, V_B is 13 % of V_W: back-fitted to text-to-3D, baseline (2, 1).

    (R, K) = (1, 4) then costs 65 % of the baseline, and 8 resamples are best.
    """
    cost, between, within = CostModel(0.0, 9.0, 1.0), 0.13, 1.0
    assert cost.seconds(1, 4) / cost.seconds(2, 1) == pytest.approx(0.65)
    assert best_resamples(between, within, cost) == 8
    for k, published in {2: 1.63, 4: 2.28, 8: 2.60, 16: 2.34}.items():
        multiplier = effective_compute_multiplier(
            (between + within) / 2, cost.seconds(2, 1), between + within / k, cost.seconds(1, k)
        )
        assert multiplier == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(
    ("between", "within", "upstream", "denoise", "best"),
    [
        (0, 1, 1, 1, 16),
        (-1, 1, 1, 1, 16),
        (1, 0, 1, 1, 1),
        (1, -1, 1, 1, 1),
        (1, 1, 0, 1, 1),
        (1, 1, -1, 1, 1),
        (1, 1, 1, 0, 16),
        (1, 1, 1, -1, 16),
        (0, 0, 1, 1, 1),
        (0, 1, 0, 1, 1),
        (1, 0, 1, 0, 1),
        (0, 1, 1, 0, 16),
        (1e-300, 1e300, 1, 1, 16),
    ],
)
def test_a_variance_or_cost_that_is_not_resolved_counts_as_none(
    between, within, upstream, denoise, best
):
    cost = CostModel(0.0, upstream, denoise)
    assert best_resamples(between, within, cost, largest=16) == best

    kept = [max(value, 0) for value in (between, within, upstream, denoise)]
    cost = CostModel(0.0, *kept[2:])
    products = [variance_times_cost(kept[0], kept[1], cost, k) for k in range(1, 17)]
    assert products[best - 1] <= min(products) * (1 + 1e-12)


def test_the_multiplier_is_the_cost_at_equal_variance():
    """The baseline needs 5 / 2 times as many batches, each at 0.3 / 0.4 of the method's seconds."""
    assert effective_compute_multiplier(5, 0.3, 2, 0.4) == pytest.approx(5 / 2 * 0.3 / 0.4)
    assert effective_compute_multiplier(5, 0.3, 2, 0.3) == relative_efficiency(5, 2) == 2.5


def test_without_variance_an_estimator_is_infinitely_better_than_one_with_it():
    assert relative_efficiency(1, 0) == effective_compute_multiplier(1, 1, 0, 9) == math.inf
    assert relative_efficiency(0, 1) == effective_compute_multiplier(0, 1, 1, 9) == 0
    assert math.isnan(relative_efficiency(0, 0))
    assert math.isnan(effective_compute_multiplier(0, 1, 0, 9))


def test_a_variance_that_is_nan_stays_nan():
    assert math.isnan(relative_efficiency(math.nan, 1))
    assert math.isnan(relative_efficiency(1, math.nan))
    assert math.isnan(noise_ratio(1, math.nan, 4))
    assert math.isnan(steps_ratio(math.nan, 0.5))


def test_noise_ratio_is_the_relative_squared_error_of_a_batch():
    """Means of 8 rows of N(μ, 4 I) in 3 dimensions: E‖ḡ - μ‖² / ‖μ‖²."""
    mu = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    errors = 2 * numbers(3, 4000, 8, 3).mean(1)
    relative = errors.square().sum(1) / mu.square().sum()
    z = (relative.mean() - noise_ratio(12, 9, 8)) / (relative.std() / len(relative) ** 0.5)
    assert noise_ratio(12, 9, 8) == pytest.approx(12 / 72)
    assert abs(z) < LIMIT


def test_a_signal_that_is_not_resolved_has_an_infinite_noise_ratio():
    assert noise_ratio(1, 0, 8) == noise_ratio(1, -0.5, 8) == math.inf
    assert math.isnan(noise_ratio(0, -0.5, 8))
    assert noise_ratio(0, 1, 8) == 0


def test_steps_fall_with_variance_only_where_noise_is_the_bottleneck():
    for nu in (0.0, 0.3, 1.0, 20.0):
        for r in (0.0, 0.25, 1.0, 3.0):
            assert steps_ratio(nu, r) == pytest.approx((1 + nu) / (1 + nu * r))
        assert steps_ratio(nu, 0) <= 1 + nu + 1e-12
    assert steps_ratio(1e-3, 0.1) == pytest.approx(1, abs=1e-3)
    assert steps_ratio(1e6, 0.1) == pytest.approx(10, rel=1e-4)
    assert steps_ratio(math.inf, 0.1) == pytest.approx(10)
    assert steps_ratio(math.inf, 0) == math.inf


def test_the_rule_of_steps_is_that_of_a_tuned_step_on_a_quadratic():
    """A step of size a leaves (1 - a)² + a² ν of a squared distance of 1, on average."""
    sizes = torch.linspace(0, 1, 100_001, dtype=torch.float64)

    def progress(nu):
        return 1 - float(((1 - sizes) ** 2 + sizes**2 * nu).min())

    for nu, r in ((0.05, 0.1), (0.5, 0.2), (4.0, 0.5), (30.0, 0.1)):
        faster = progress(nu * r) / progress(nu)
        assert faster == pytest.approx(steps_ratio(nu, r), rel=1e-6)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(level):
    """Exponential numbers of means 3 and 2; n = 80 repetitions."""
    experiments, covered = 200, 0
    source = torch.Generator().manual_seed(4)
    for seed in range(experiments):
        draws = torch.empty(2, 80, dtype=torch.float64).exponential_(generator=source)
        found = bootstrap(ratio, 3 * draws[0], 2 * draws[1], resamples=1000, level=level, seed=seed)
        covered += found.low <= 3 / 2 <= found.high
    error = math.sqrt(level * (1 - level) / experiments)
    assert abs(covered / experiments - level) < LIMIT * error
    assert covered < experiments


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    sample = numbers(5, 400)
    found = bootstrap(lambda mean: mean, sample, resamples=20_000)
    error = float(sample.std()) / 20
    assert found.estimate == pytest.approx(float(sample.mean()))
    assert found.low == pytest.approx(found.estimate - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.estimate + 1.96 * error, abs=0.1 * error)


def test_samples_are_resampled_together():
    sample = numbers(6, 30).exp()
    assert bootstrap(ratio, 4 * sample, sample) == Interval(4.0, 4.0, 4.0)
    apart = bootstrap(ratio, 4 * sample, sample.flip(0))
    assert apart.high - apart.low > 1


def test_vectors_are_averaged_and_resampled_with_the_numbers():
    """V = E‖g‖² - ‖E g‖² from gradients (n, d) and squared norms (n,), against a loop over both."""
    gradients = numbers(7, 20, 3) + 1
    squares = gradients.square().sum(1)

    def statistic(mean, square):
        return square - mean.square().sum(1)

    found = bootstrap(statistic, gradients, squares, resamples=4000)
    assert found.estimate == pytest.approx(float(gradients.var(0, correction=0).sum()))

    source, by_hand = torch.Generator().manual_seed(8), []
    for _ in range(4000):
        rows = gradients[torch.randint(20, (20,), generator=source)]
        by_hand.append(rows.var(0, correction=0).sum())
    ends = torch.stack(by_hand).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    spread = float(torch.stack(by_hand).std())
    assert [found.low, found.high] == pytest.approx(ends.tolist(), abs=0.15 * spread)


def test_the_interval_is_a_function_of_the_seed_and_disturbs_no_other_draw():
    sample, state = numbers(9, 25), torch.random.get_rng_state()
    first, again = (bootstrap(lambda mean: mean, sample) for _ in range(2))
    assert first == again
    assert first != bootstrap(lambda mean: mean, sample, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bootstrap(lambda mean: mean, sample.float()).low == pytest.approx(first.low, abs=1e-6)


def test_a_denominator_that_may_be_zero_makes_the_upper_end_infinite():
    """Means of 1 and of 0.1 ± 0.1: one resample in six has a denominator of 0 or less."""
    numerator, denominator = 1 + 0.1 * numbers(10, 50), numbers(11, 50)
    denominator = 0.1 + (denominator - denominator.mean()) / denominator.std() * 0.1 * 50**0.5
    found = bootstrap(ratio, numerator, denominator)
    assert found.estimate == pytest.approx(float(numerator.mean()) / 0.1)
    assert 2 < found.low < found.estimate
    assert found.high == math.inf
    assert bootstrap(ratio, numerator, denominator, level=0.5).high < math.inf

    lost = bootstrap(ratio, numerator, -1 - numerator)
    assert lost == Interval(math.inf, math.inf, math.inf)


def test_ratio_is_undetermined_where_neither_number_is_resolved():
    numerator = torch.tensor([6.0, -6.0, 6.0, 6.0, 0.0, -6.0, math.nan, 6.0])
    denominator = torch.tensor([2.0, 2.0, 0.0, -2.0, 0.0, -2.0, 2.0, math.nan])
    expected = torch.tensor([3.0, -3.0, math.inf, math.inf] + 4 * [math.nan])
    assert torch.equal(ratio(numerator, denominator).isnan(), expected.isnan())
    assert torch.equal(ratio(numerator, denominator)[:4], expected[:4])


def test_undetermined_resamples_widen_the_interval_at_both_ends():
    sample = numbers(12, 100)

    def undetermined(share):
        """The mean, but NaN for that share of resamples."""
        return lambda mean: torch.where(torch.arange(len(mean)) % 1000 < 1000 * share, nan, mean)

    nan = torch.tensor(math.nan, dtype=torch.float64)
    plain = bootstrap(undetermined(0.0), sample)
    few, many = bootstrap(undetermined(0.02), sample), bootstrap(undetermined(0.03), sample)
    assert -math.inf < few.low < plain.low < plain.high < few.high < math.inf
    assert (many.low, many.high) == (-math.inf, math.inf)
    assert math.isnan(few.estimate)

    sample[3] = math.nan
    lost = bootstrap(lambda mean: mean, sample)
    assert math.isnan(lost.estimate)
    assert (lost.low, lost.high) == (-math.inf, math.inf)


UNIT_COST = CostModel(0.0, 1.0, 1.0)
ROWS = torch.ones(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit([1.0, 2.0], GRID[:2]), r"at least three measurements .* got \[\(1, 1\), "),
        (lambda: fit([1.0] * 4, [(2, 1), (2, 3), (2, 3), (2, 9)]), "at least three measurements"),
        (lambda: fit([1.0, 2.0, 3.3], [(1, 1), (2, 1), (3, 1)]), "vary both, as in"),
        (lambda: fit([0.7, 1.9, 3.3], [(1, 7), (2, 4), (6, 2)]), "at least three measurements"),
        (lambda: fit([], []), "at least three measurements"),
        (lambda: CostModel.fit([1, 2], [1], [1.0, 2.0]), r"equally long, but got .*\(2, 1, 2\)"),
        (lambda: fit([1.0, 2.0, 3.0, 4.0, 0.0]), r"`seconds` positive .* got \(2, 4, 0.0\)"),
        (lambda: fit([1.0, 2.0, math.nan, 4.0, 5.0]), r"got \(1, 4, nan\): leave this measurement"),
        (lambda: fit([1.0, math.inf, 3.0, 4.0, 5.0]), r"got \(1, 2, inf\)"),
        (lambda: fit([1.0], [(0, 1)]), r"`samples` and `resamples` .* at least 1 .* \(0, 1, 1.0\)"),
        (lambda: fit([1.0], [(1, 0)]), r"at least 1 .* \(1, 0, 1.0\)"),
        (lambda: best_resamples(1, 1, UNIT_COST, largest=0), "`largest` .* at least 1, but got 0"),
        (lambda: best_resamples(math.nan, 1, UNIT_COST), "`between`, .* finite, but got nan, 1"),
        (lambda: best_resamples(1, math.inf, UNIT_COST), "finite, but got 1, inf"),
        (lambda: best_resamples(1, 1, CostModel(0.0, math.nan, 1.0)), "`cost` .* upstream=nan"),
        (lambda: variance_times_cost(1, 1, UNIT_COST, 0), "`resamples` .* positive .* got 0"),
        (lambda: effective_compute_multiplier(1, 0, 1, 1), "`baseline_seconds` .* positive"),
        (lambda: effective_compute_multiplier(1, 1, 1, math.inf), "`seconds` .* finite, .* inf"),
        (lambda: effective_compute_multiplier(-1, 1, 1, 1), "`baseline_variance` .* got -1"),
        (lambda: relative_efficiency(-1, 1), "`baseline_variance` expected to be 0 or more"),
        (lambda: relative_efficiency(1, -2), "`variance` expected to be 0 or more, but got -2"),
        (lambda: noise_ratio(-1, 1, 1), "`variance` expected to be 0 or more"),
        (lambda: noise_ratio(1, 1, 0), "`batch` expected to be at least 1"),
        (lambda: steps_ratio(-1, 1), "`noise_ratio` expected to be 0 or more"),
        (lambda: steps_ratio(1, -1), "`variance_ratio` expected to be 0 or more"),
        (lambda: bootstrap(ratio), r"`samples` .* but got shapes \[\]"),
        (lambda: bootstrap(ratio, ROWS, ROWS[1:]), r"one n .* got shapes \[\(5,\), \(4,\)\]"),
        (lambda: bootstrap(ratio, ROWS[:1], ROWS[:1]), "at least 2, but got shapes"),
        (lambda: bootstrap(ratio, ROWS, ROWS[0]), r"got shapes \[\(5,\), \(\)\]"),
        (lambda: bootstrap(ratio, ROWS, ROWS, resamples=0), "`resamples` expected to be at least"),
        (lambda: bootstrap(ratio, ROWS, ROWS, level=95), "`level` .* 0 and 1, but got 95"),
        (
            lambda: bootstrap(lambda mean: mean.mean(), ROWS, resamples=10),
            r"`statistic` expected to return one number .* shape \(11,\), but got \(\): reduce",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
