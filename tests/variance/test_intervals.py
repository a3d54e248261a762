"""Confidence intervals: how often they cover, what they share, what the undefined does to them."""

import math

import pytest
import torch

from lightning_vr.variance.intervals import Interval, jackknife, median_interval, ratio

LIMIT = 4.0
"""Standard errors that a statistical test allows."""

ROWS = torch.ones(5)


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.mark.parametrize(("n", "level"), [(9, 0.95), (15, 0.95), (40, 0.8)])
def test_the_interval_of_a_median_covers_it_at_least_as_often_as_it_says(n, level):
    experiments, covered = 2000, 0
    drawn = torch.empty(experiments, n, dtype=torch.float64)
    for values in drawn.exponential_(generator=torch.Generator().manual_seed(12)):
        found = median_interval(values, level=level)
        assert found.low <= found.estimate <= found.high
        covered += found.low <= math.log(2) <= found.high
    error = math.sqrt(level * (1 - level) / experiments)
    assert covered / experiments > level - LIMIT * error
    # order statistics come in steps; for these n the next narrower ones would cover too rarely
    assert covered < experiments


def test_the_interval_of_a_median_lies_at_known_order_statistics():
    # P(X < 2) = (1 + 9) / 512 for nine values: 96.1 % between the second and the eighth
    assert median_interval(torch.arange(9).flip(0)) == Interval(4.0, 1.0, 7.0)
    assert median_interval(torch.tensor([3.0, 1.0])) == Interval(2.0, 1.0, 3.0)
    assert median_interval(torch.tensor([3.0])) == Interval(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(ratio), r"`samples` must .* got shapes \[\]"),
        (lambda: bootstrap(ratio, ROWS, ROWS[1:]), r"one n .* got shapes \[\(5,\), \(4,\)\]"),
        (lambda: bootstrap(ratio, ROWS[:1], ROWS[:1]), "at least 2, got shapes"),
        (lambda: bootstrap(ratio, ROWS, ROWS[0]), r"got shapes \[\(5,\), \(\)\]"),
        (
            lambda: bootstrap(ratio, ROWS, ROWS, resamples=0),
            "`resamples` must be at least 1",
        ),
        (lambda: bootstrap(ratio, ROWS, ROWS, level=95), "`level` .* 0 and 1, got 95"),
        (
            lambda: bootstrap(lambda mean: mean.mean(), ROWS, resamples=10),
            r"`statistic` must return one number .* shape \(11,\), got \(\): reduce",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
