"""Moments against the formulas of their docstring, summed by hand over all measurements."""

import math

import pytest
import torch

from lightning_vr.variance.moments import Moments

LIMIT = 4.0
"""Standard errors that a statistical test allows."""


def by_hand(values, weights):
    """Weighted mean and its standard error over the first dimension, all values at once."""
    counts = values.isfinite() & (weights > 0)
    w, v = weights * counts, values.masked_fill(~counts, 0)
    total, squared = w.sum(0), (w**2).sum(0)
    mean = (w * v).sum(0) / total
    scatter = (w * (v - mean) ** 2).sum(0)
    return mean, (squared / total**2 * scatter / (total - squared / total)).sqrt()


def measured(values, weights=None, **options):
    moments = Moments(*values.shape[1:], **options)
    for i, value in enumerate(values):
        moments.add(value, 1.0 if weights is None else weights[i])
    return moments


def assert_same(a, b, rtol=1e-12):
    for name in ("weight", "mean", "error"):
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=rtol, atol=0, equal_nan=True
        )


@pytest.fixture
def values(source):
    return 3 + torch.randn(9, 2, 5, generator=source, dtype=torch.float64)


@pytest.fixture
def weights(values, source):
    return 0.1 + torch.rand(values.shape, generator=source, dtype=torch.float64)


def test_mean_and_error_are_those_of_all_measurements_at_once(values, weights):
    moments = measured(values, weights)
    mean, error = by_hand(values, weights)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.error, error, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.weight, weights.sum(0))


def test_with_equal_weights_the_error_is_that_of_any_textbook(values):
    moments = measured(values)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.error, values.std(0) / math.sqrt(len(values)))


def test_the_error_is_how_far_means_scatter():
    """Of 4000 weighted means of 6 measurements, the squared error is the variance, unbiased."""
    source = torch.Generator().manual_seed(1)
    values = 2 * torch.randn(6, 4000, generator=source, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.3, 2.0, 0.1, 1.5, 0.7], dtype=torch.float64)
    moments = measured(values, weights)
    variance = 4 * float((weights**2).sum() / weights.sum() ** 2)
    for estimates in (moments.error**2, moments.mean**2):
        z = (estimates.mean() - variance) / (estimates.std() / math.sqrt(4000))
        assert abs(float(z)) < LIMIT


def test_faded_measurements_weigh_a_factor_less_for_each_later_one(values):
    moments = Moments(*values.shape[1:])
    for value in values:
        moments.fade(0.7)
        moments.add(value)
    ages = torch.arange(len(values) - 1, -1, -1, dtype=torch.float64)
    mean, error = by_hand(values, (0.7**ages)[:, None, None].expand_as(values))
    torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.error, error, rtol=1e-12, atol=0)


def test_each_element_fades_by_a_factor_of_its_own(values):
    factor = torch.linspace(0.2, 1, 5, dtype=torch.float64)
    moments = measured(values[:4])
    moments.fade(factor)
    moments.add(values[4])
    weights = torch.ones_like(values[:5])
    weights[:4] *= factor
    mean, error = by_hand(values[:5], weights)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.error, error, rtol=1e-12, atol=0)


def test_sets_merge_exactly_and_in_any_order(values, weights):
    whole = measured(values, weights)
    a, b, c = ((values[i : i + 3], weights[i : i + 3]) for i in (0, 3, 6))

    left = measured(*a)
    left.merge(measured(*b))
    left.merge(measured(*c))
    tail, right = measured(*b), measured(*a)
    tail.merge(measured(*c))
    right.merge(tail)
    back = measured(*c)
    back.merge(measured(*b))
    back.merge(measured(*a))
    for moments in (left, right, back):
        assert_same(moments, whole)


def test_nothing_measured_merges_as_nothing(values):
    moments, empty = measured(values), Moments(2, 5)
    moments.merge(Moments(2, 5))
    empty.merge(measured(values))
    assert_same(moments, measured(values), rtol=0)
    assert_same(empty, measured(values), rtol=0)


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_elements_that_are_not_numbers_do_not_count(values, weights, missing):
    values[[0, 3, 8], 1, 2] = missing
    values[:, 0, 0] = missing
    moments = measured(values, weights)
    mean, error = by_hand(values, weights)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=0, equal_nan=True)
    torch.testing.assert_close(moments.error, error, rtol=1e-12, atol=0, equal_nan=True)
    assert moments.mean.isnan().sum() == 1
    assert float(moments.weight[0, 0]) == 0


def test_elements_of_weight_zero_do_not_count(values):
    weights = torch.ones_like(values)
    weights[1, 0], weights[:, 1, 4] = 0, 0
    moments = measured(values, weights)
    mean, error = by_hand(values, weights)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=0, equal_nan=True)
    torch.testing.assert_close(moments.error, error, rtol=1e-12, atol=0, equal_nan=True)

    unchanged = measured(values)
    unchanged.add(values[0] + 100, 0.0)
    assert_same(unchanged, measured(values), rtol=0)


def test_before_the_first_measurement_nothing_is_known():
    moments = Moments(3)
    assert moments.mean.isnan().all()
    assert moments.error.isnan().all()
    assert (moments.weight == 0).all()


@pytest.mark.parametrize("fades", range(12))
def test_one_measurement_has_no_error_however_much_it_has_faded(fades):
    moments = Moments(1)
    moments.add(torch.tensor([5.0]))
    for _ in range(fades):
        moments.fade(0.9)
        moments.add(torch.tensor([math.nan]))
    assert moments.mean.tolist() == [5.0]
    assert moments.error.isnan().all()


def test_a_state_goes_on_where_it_was_kept(values, weights, tmp_path):
    first = measured(values[:5], weights[:5])
    torch.save(first.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Moments(2, 5, state=state)
    assert_same(again, first, rtol=0)

    kept = state.clone()
    for value, weight in zip(values[5:], weights[5:], strict=True):
        again.add(value, weight)
    assert_same(again, measured(values, weights), rtol=0)
    assert torch.equal(state, kept)


def test_small_scatter_around_a_large_mean_keeps_its_precision(source):
    """Measurements 1e8 ± 1e-3: sums of squares would lose all sixteen digits."""
    small = torch.randint(-1000, 1000, (400,), generator=source).double() * 2.0**-20
    moments = measured(1e8 + small)
    assert float(moments.mean) - 1e8 == pytest.approx(float(small.mean()), abs=1e-7)
    assert float(moments.error) == pytest.approx(float(small.std()) / 20, rel=1e-4)

    halves = measured(1e8 + small[:200])
    halves.merge(measured(1e8 + small[200:]))
    assert float(halves.error) == pytest.approx(float(small.std()) / 20, rel=1e-4)


def test_measurements_in_low_precision_are_summed_in_float64():
    moments = Moments(2)
    for _ in range(1000):
        moments.add(torch.tensor([0.1, 1.0], dtype=torch.bfloat16, requires_grad=True))
    assert moments.mean.dtype == torch.float64
    assert not moments.mean.requires_grad
    exact = torch.tensor([0.1, 1.0], dtype=torch.bfloat16).double()
    torch.testing.assert_close(moments.mean, exact, rtol=1e-13, atol=0)
