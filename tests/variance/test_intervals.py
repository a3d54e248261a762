"""Confidence intervals: how often they cover, what they share, what the undefined does to them."""

import math

import pytest
import torch
from scipy import stats

from lightning_vr.variance.intervals import Interval, jackknife, ratio, simultaneous_level

LIMIT = 4.0
"""Standard errors that a statistical test allows."""

ROWS = torch.ones(5)


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_ratio(numerator, denominator):
    return ratio(numerator, denominator).log()


@pytest.mark.parametrize(("n", "level"), [(3, 0.95), (4, 0.95), (6, 0.8), (10, 0.95)])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(n, level):
    """Skewed numbers of means 3 and 2 with a common part, as repetitions of an audit are."""
    experiments, covered = 1000, 0
    source = torch.Generator().manual_seed(4)
    shape = torch.full((3, experiments, n), 4.0, dtype=torch.float64)
    parts = torch._standard_gamma(shape, generator=source) / 8
    for first, second, common in zip(*parts, strict=True):
        found = jackknife(log_ratio, 3 * (first + common), 2 * (second + common), level=level)
        found = found.exp()
        covered += found.low <= 3 / 2 <= found.high
    error = math.sqrt(level * (1 - level) / experiments)
    assert abs(covered / experiments - level) < LIMIT * error


def coverage_of_rare_large_values(n, **settings):
    """Share of 95 % intervals of a log ratio of means 1, of exponential numbers, that hold it."""
    source = torch.Generator().manual_seed(11)
    pairs = torch.empty(1500, 2, n, dtype=torch.float64).exponential_(generator=source)
    found = [jackknife(log_ratio, *pair, **settings) for pair in pairs]
    return sum(each.low <= 0 <= each.high for each in found) / len(found)


@pytest.mark.parametrize("n", [4, 8])
def test_a_kurtosis_restores_the_coverage_that_rare_large_values_take(n):
    plain = coverage_of_rare_large_values(n)
    mended = coverage_of_rare_large_values(n, excess_kurtosis=1.0)
    assert plain < mended
    assert 0.93 < mended < 0.98


def test_a_kurtosis_leaves_fewer_degrees_of_freedom():
    sample = numbers(5, 7)
    plain, mended = (jackknife(lambda x: x, sample, excess_kurtosis=k) for k in (0.0, 2.0))
    # error² of normal numbers has variance 2 / 6, of the others 2 / 6 + 2 / 7
    widths = stats.t.ppf(0.975, [6, 2 / (2 / 6 + 2 / 7)])
    assert (mended.high - mended.low) / (plain.high - plain.low) == pytest.approx(
        widths[1] / widths[0]
    )


def test_the_interval_of_a_mean_is_that_of_students_t():
    sample = numbers(5, 7)
    found = jackknife(lambda mean: mean, sample, level=0.9)
    low, high = stats.t.interval(0.9, 6, float(sample.mean()), stats.sem(sample.numpy()))
    assert found == pytest.approx([float(sample.mean()), low, high])


def test_what_repetitions_share_cancels():
    sample = numbers(6, 30).exp()
    assert jackknife(ratio, 4 * sample, sample) == Interval(4.0, 4.0, 4.0)
    apart = jackknife(ratio, 4 * sample, sample.flip(0))
    assert apart.high - apart.low > 1


def test_vectors_are_averaged_with_the_numbers():
    """V = E‖g‖² - ‖E g‖² from gradients (n, d) and squared norms (n,), against a loop."""
    gradients = numbers(7, 20, 3) + 1
    squares = gradients.square().sum(1)

    def statistic(mean, square):
        return square - mean.square().sum(1)

    found = jackknife(statistic, gradients, squares)
    assert found.estimate == pytest.approx(float(gradients.var(0, correction=0).sum()))
    rows = [torch.cat([gradients[:i], gradients[i + 1 :]]) for i in range(20)]
    left_out = torch.stack([row.var(0, correction=0).sum() for row in rows])
    error = math.sqrt(19 / 20 * float((left_out - left_out.mean()).square().sum()))
    assert found.high - found.estimate == pytest.approx(stats.t.ppf(0.975, 19) * error)


def test_the_interval_disturbs_no_draw_and_takes_any_precision():
    sample, state = numbers(9, 25), torch.random.get_rng_state()
    found = jackknife(lambda mean: mean, sample)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert jackknife(lambda mean: mean, sample.float()).low == pytest.approx(found.low, abs=1e-6)


def test_what_is_not_resolved_from_zero_without_a_repetition_leaves_all_numbers_open():
    numerator, denominator = torch.ones(3), torch.tensor([3.0, -1.0, -1.0])
    found = jackknife(log_ratio, numerator, denominator)
    assert found == Interval(pytest.approx(math.log(3)), -math.inf, math.inf)
    assert found.exp() == Interval(pytest.approx(3), 0.0, math.inf)
    lost = jackknife(log_ratio, numerator, -numerator)
    assert lost == Interval(math.inf, -math.inf, math.inf)
    nothing = jackknife(log_ratio, 0 * numerator, 0 * numerator)
    assert math.isnan(nothing.estimate)
    assert nothing[1:] == (-math.inf, math.inf)


def test_ratio_is_undetermined_where_neither_number_is_resolved():
    numerator = torch.tensor([6.0, -6.0, 6.0, 6.0, 0.0, -6.0, math.nan, 6.0])
    denominator = torch.tensor([2.0, 2.0, 0.0, -2.0, 0.0, -2.0, 2.0, math.nan])
    expected = torch.tensor([3.0, -3.0, math.inf, math.inf] + 4 * [math.nan])
    assert torch.equal(ratio(numerator, denominator).isnan(), expected.isnan())
    assert torch.equal(ratio(numerator, denominator)[:4], expected[:4])


def test_independent_errors_add_in_squares_at_each_end():
    found = Interval(1.0, -2.0, 2.0).plus(Interval(10.0, 6.0, 10.0))
    assert found == Interval(11.0, 6.0, 12.0)
    exact = Interval(2.0, 2.0, 2.0)
    assert Interval(1.0, 0.0, 3.0).plus(exact) == Interval(3.0, 2.0, 5.0)
    assert Interval(math.inf, 0.0, math.inf).plus(exact)[1:] == (-math.inf, math.inf)


def test_several_intervals_hold_together_as_often_as_they_say():
    assert simultaneous_level(0.95, 1) == 0.95
    assert simultaneous_level(0.95, 5) ** 5 == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jackknife(ratio), r"`samples` must .* got shapes \[\]"),
        (lambda: jackknife(ratio, ROWS, ROWS[1:]), r"one n .* got shapes \[\(5,\), \(4,\)\]"),
        (lambda: jackknife(ratio, ROWS[:1], ROWS[:1]), "at least 2, got shapes"),
        (lambda: jackknife(ratio, ROWS, ROWS[0]), r"got shapes \[\(5,\), \(\)\]"),
        (lambda: jackknife(ratio, ROWS, ROWS, level=95), "`level` .* 0 and 1, got 95"),
        (lambda: jackknife(ratio, ROWS, ROWS, excess_kurtosis=-1), "at least 0, got -1"),
        (
            lambda: jackknife(lambda mean: mean.mean(), ROWS),
            r"`statistic` must return one number .* shape \(6,\), got \(\): reduce",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
