"""Costs, the best number of resamples and savings against brute force and closed forms."""

import math
import random

import pytest
import torch
from scipy import stats

from lightning_vr.variance.accounting import (
    CostModel,
    best_resamples,
    effective_compute_multiplier,
    fixed_and_marginal,
    noise_ratio,
    relative_efficiency,
    steps_ratio,
    training_speedup,
    variance_times_cost,
)

LIMIT = 4.0
"""Standard errors that a statistical test allows."""


def log_uniform(source, decades=2.0):
    return 10 ** source.uniform(-decades, decades)


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("truth", [(0.01, 0.05), (0.0, 7e-5), (5.0, 1e-3), (1.0, 1e-9)])
@pytest.mark.parametrize("sizes", [(1, 2), (16, 64), (3, 3000)])
def test_the_costs_of_a_pass_are_those_of_the_line_that_they_lie_on(truth, sizes):
    seconds = [truth[0] + rows * truth[1] for rows in sizes]
    assert fixed_and_marginal(*sizes, *seconds) == pytest.approx(truth, rel=1e-6, abs=1e-12)


def test_no_row_costs_nothing_however_noisy_the_clock_is():
    source, unresolved = random.Random(0), 0
    for _ in range(500):
        few = source.randint(1, 64)
        many = source.randint(few, 256)
        seconds = log_uniform(source), log_uniform(source)
        fixed, marginal = fixed_and_marginal(few, many, *seconds)
        assert fixed >= 0
        assert marginal > 0
        assert fixed + many * marginal >= seconds[1] * (1 - 1e-12)
        if seconds[1] <= seconds[0]:
            unresolved += 1
            assert (fixed, marginal) == (0, seconds[1] / many)
    assert unresolved > 100


def test_a_single_size_gives_a_row_its_fraction_of_the_seconds():
    assert fixed_and_marginal(8, 8, 1.6, 1.6) == (0, pytest.approx(0.2))


def test_a_larger_pass_that_was_faster_makes_no_number_of_resamples_free():
    """At V_W = V_B and an upstream of a row's cost: K = 1, where a free row would give 64."""
    fixed, marginal = fixed_and_marginal(16, 64, 1.1, 1.0)
    assert best_resamples(1, 1, CostModel(fixed, marginal, marginal)) == 1
    assert best_resamples(1, 1, CostModel(fixed, marginal, 0.0)) == 64


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
        efficiency = (between + within) / 2 / (between + within / k)
        seconds = [torch.tensor([cost.seconds(2, 1)]), torch.tensor([cost.seconds(1, k)])]
        variances = torch.full((2,), efficiency), torch.ones(2)
        found = effective_compute_multiplier(*variances, *(x.expand(2) for x in seconds))
        assert found.estimate == pytest.approx(published, abs=0.01)


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
    variances = torch.full((9,), 5.0), torch.full((9,), 2.0)
    assert relative_efficiency(*variances) == pytest.approx([2.5] * 3)
    times = torch.full((7,), 0.3), torch.full((7,), 0.4)
    assert effective_compute_multiplier(*variances, *times) == pytest.approx(
        [5 / 2 * 0.3 / 0.4] * 3
    )


def test_the_interval_of_the_multiplier_holds_the_doubt_of_variance_and_of_time():
    base, own = numbers(8, 6).exp(), numbers(9, 6).exp()
    turns = 0.1 * numbers(10, 7)
    found = effective_compute_multiplier(base, own, turns.exp(), torch.ones(7))
    efficiency, faster = relative_efficiency(base, own), float(turns.mean())
    half = 2.4469 * float(turns.std()) / 7**0.5  # Student's t of 6 degrees of freedom
    assert found.estimate == pytest.approx(efficiency.estimate * math.exp(faster))
    for end in ("low", "high"):
        log = math.log(getattr(efficiency, end) / efficiency.estimate)
        own_log = math.log(getattr(found, end) / found.estimate)
        assert abs(own_log) == pytest.approx(math.hypot(log, half), rel=1e-4)


def test_the_predicted_speedup_is_that_of_steps_and_of_time():
    """ν = 40 / 20; a quarter of the variance in steps 1.5 times as long: (1 + 2) / (1 + 0.5)."""
    found = training_speedup(
        torch.full((3,), 40.0),
        torch.full((3,), 10.0),
        torch.tensor([10.0, 20.0, 30.0]),
        torch.ones(3),
        torch.full((3,), 1.5),
    )
    assert found.estimate == pytest.approx(3 / 1.5 / 1.5)
    # what is not known is the signal alone
    assert 1 / 1.5 < found.low < found.estimate < found.high
    wider = training_speedup(
        *(numbers(i, 5).exp() for i in (11, 12, 13)), torch.ones(5), torch.ones(5), level=0.99
    )
    narrow = training_speedup(
        *(numbers(i, 5).exp() for i in (11, 12, 13)), torch.ones(5), torch.ones(5)
    )
    assert wider.low < narrow.low < narrow.high < wider.high


@pytest.mark.parametrize(("signal", "kurtosis"), [(-1.0, 1.0), (1.0, 0.5), (1e9, 0.0)])
def test_the_predicted_speedup_is_as_uncertain_as_steps_are_long(signal, kurtosis):
    """Rare large variances count as far as noise is the bottleneck: V / (s + V) of them."""
    same, turns = torch.ones(7), 0.1 * numbers(10, 7)
    found = training_speedup(same, same, torch.full((7,), signal), turns.exp(), same)
    quantile = stats.t.ppf(0.975, 2 / (2 / 6 + kurtosis / 7))
    half = quantile * float(turns.std()) / 7**0.5
    logs = [float(turns.mean()) + sign * half for sign in (0, -1, 1)]
    assert found == pytest.approx([math.exp(log) for log in logs], rel=1e-4)


def test_a_variance_that_is_nan_stays_nan():
    assert math.isnan(noise_ratio(1, math.nan, 4))
    assert math.isnan(fewer_steps(math.nan, 0.5))


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


def fewer_steps(nu, r):
    """Steps saved at noise ratio ν by variance times r: signal 1, variances ν and ν r."""
    baseline, variance, signal = (
        torch.tensor(x, dtype=torch.float64)
        for x in ((1.0, r, 0.0) if math.isinf(nu) else (nu, nu * r, 1.0))
    )
    return float(steps_ratio(baseline, variance, signal))


def test_steps_fall_with_variance_only_where_noise_is_the_bottleneck():
    for nu in (0.0, 0.3, 1.0, 20.0):
        for r in (0.0, 0.25, 1.0, 3.0):
            assert fewer_steps(nu, r) == pytest.approx((1 + nu) / (1 + nu * r))
        assert fewer_steps(nu, 0) <= 1 + nu + 1e-12
    assert fewer_steps(1e-3, 0.1) == pytest.approx(1, abs=1e-3)
    assert fewer_steps(1e6, 0.1) == pytest.approx(10, rel=1e-4)
    assert fewer_steps(math.inf, 0.1) == pytest.approx(10)
    assert fewer_steps(math.inf, 0) == math.inf


def test_a_signal_that_is_not_resolved_saves_what_the_variance_does():
    numbers_of = (torch.tensor(x) for x in (10.0, 5.0, -3.0))
    assert float(steps_ratio(*numbers_of)) == 2.0


def test_the_rule_of_steps_is_that_of_a_tuned_step_on_a_quadratic():
    """A step of size a leaves (1 - a)² + a² ν of a squared distance of 1, on average."""
    sizes = torch.linspace(0, 1, 100_001, dtype=torch.float64)

    def progress(nu):
        return 1 - float(((1 - sizes) ** 2 + sizes**2 * nu).min())

    for nu, r in ((0.05, 0.1), (0.5, 0.2), (4.0, 0.5), (30.0, 0.1)):
        faster = progress(nu * r) / progress(nu)
        assert faster == pytest.approx(fewer_steps(nu, r), rel=1e-6)


UNIT_COST = CostModel(0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed_and_marginal(0, 2, 1.0, 2.0), "`few` must be at least 1, got 0"),
        (lambda: fixed_and_marginal(4, 2, 1.0, 2.0), "`many` must be at least 4, got 2"),
        (lambda: best_resamples(1, 1, UNIT_COST, largest=0), "`largest` must be at least 1, got 0"),
        (lambda: best_resamples(math.nan, 1, UNIT_COST), "`between`, .* finite, got nan, 1"),
        (lambda: best_resamples(1, math.inf, UNIT_COST), "finite, got 1, inf"),
        (lambda: best_resamples(1, 1, CostModel(0.0, math.nan, 1.0)), "`cost` .* upstream=nan"),
        (lambda: variance_times_cost(1, 1, UNIT_COST, 0), "`resamples` must be positive .* got 0"),
        (lambda: noise_ratio(-1, 1, 1), "`variance` must be at least 0, got -1"),
        (lambda: noise_ratio(1, 1, 0), "`batch` must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
