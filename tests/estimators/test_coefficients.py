"""Coefficients and gate from statistics made by hand."""

import itertools
import json

import pytest
import torch

from lightning_vr.core.rng import generator
from lightning_vr.estimators.taylor.coefficients import ControlFit, Cost, PilotStatistics

WIDE = torch.float64
MEMORY = 0.7


def normal(*shape, key):
    return torch.randn(shape, generator=generator("control fit", *key), dtype=WIDE)


def statistics_of(loss, parts, second_moment=1000.0, share=None, values=None):
    """Inner products of gradients ``loss (b, P)`` and ``parts (b, k, P)``."""
    bins = len(loss)
    share = torch.full((bins,), 1 / bins, dtype=WIDE) if share is None else share
    values = torch.ones(2, bins, dtype=WIDE) if values is None else values
    return PilotStatistics(
        torch.einsum("bp,bkp->bk", loss, parts),
        torch.einsum("bkp,blp->bkl", parts, parts),
        loss.square().sum(dim=1),
        torch.tensor(second_moment, dtype=WIDE),
        share,
        *values,
    )


def random_statistics(bins=3, parts=1, key=0, **options):
    loss = normal(bins, 7, key=("loss", key))
    own = normal(bins, parts, 7, key=("parts", key))
    return statistics_of(loss + own.sum(dim=1), own, **options)


def of_reductions(reductions, share):
    """Statistics of bins that remove given parts of the gradient with coefficients of one."""
    reductions = torch.as_tensor(reductions, dtype=WIDE)
    bins = len(reductions)
    ones = torch.ones(bins, 1, dtype=WIDE)
    return PilotStatistics(
        (reductions[:, None] + 1) / 2,
        ones[..., None],
        0.5 * torch.as_tensor(share, dtype=WIDE),
        torch.tensor(1.0, dtype=WIDE),
        torch.as_tensor(share, dtype=WIDE),
        ones[:, 0],
        ones[:, 0],
    )


def fit_of(*found, bins=3, cost=None, on_values=False, coefficient=None):
    fit = ControlFit(bins, on_values=on_values, coefficient=coefficient)
    fit.cost = cost
    for one in found:
        fit.add(one)
    return fit


def test_before_the_first_pilot_coefficients_are_one_and_the_gate_is_closed():
    fit = ControlFit(4, on_values=False, coefficient=None)
    assert torch.equal(fit.coefficients, torch.ones(4, 1, dtype=WIDE))
    assert not fit.is_open.any()
    assert fit.predicted_speedup == 1
    assert not fit.reductions.any()
    assert torch.equal(fit.fractions, torch.full((4,), 0.25, dtype=WIDE))


@pytest.mark.parametrize("parts", [1, 2])
def test_coefficients_are_those_of_least_squares_in_each_bin(parts):
    loss = normal(4, 9, key=("loss",))
    own = normal(4, parts, 9, key=("parts",)) + loss[:, None]
    own = own * torch.tensor([1e3, 1e-2], dtype=WIDE)[:parts, None]
    fit = fit_of(statistics_of(loss, own), bins=4)
    assert fit.coefficients.shape == (4, parts)
    for b in range(4):
        expected = torch.linalg.lstsq(own[b].T, loss[b, :, None]).solution[:, 0]
        torch.testing.assert_close(fit.coefficients[b], expected, rtol=1e-4, atol=0)


def test_the_coefficient_of_a_small_part_is_not_what_it_shares_with_a_large_one():
    """``g = odd + 0.5 even``: fitted one by one, the even coefficient would be near a thousand."""
    odd = normal(1, 9, key=("odd",))
    even = 1e-3 * (normal(1, 9, key=("even",)) + odd)
    found = statistics_of(odd + 0.5 * even, torch.stack([odd, even], dim=1))
    alone = found.products[0, 1] / found.squares[0, 1, 1]
    assert alone > 100
    fit = fit_of(found, bins=1)
    expected = torch.tensor([1.0, 0.5], dtype=WIDE)
    # the ridge is a millionth, and the odd part is a thousand times as large
    torch.testing.assert_close(fit.coefficients[0], expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_part_that_is_rounding_alone_has_coefficient_0(kept):
    loss = normal(2, 9, key=("loss",))
    own = normal(2, 2, 9, key=("parts",))
    own[:, 1 - kept] *= 1e-6
    fit = fit_of(statistics_of(loss, own), bins=2)
    assert not fit.coefficients[:, 1 - kept].any()
    expected = (loss * own[:, kept]).sum(1) / own[:, kept].square().sum(1)
    torch.testing.assert_close(fit.coefficients[:, kept], expected, rtol=1e-5, atol=0)


def test_a_bin_without_draws_has_coefficient_0_and_removes_nothing():
    loss, own = normal(2, 9, key=("loss",)), normal(2, 2, 9, key=("parts",))
    loss[1], own[1] = 0, 0
    share = torch.tensor([1.0, 0.0], dtype=WIDE)
    fit = fit_of(statistics_of(loss, own, share=share), bins=2, cost=Cost(0.0, 0.1))
    assert not fit.coefficients[1].any()
    assert fit.reductions[1] == 0


def test_a_reduction_is_that_of_the_previous_coefficients():
    """The first pilot is judged with ones, the second with what the first has found."""
    loss = normal(2, 3, 9, key=("loss",))
    own = normal(2, 3, 2, 9, key=("parts",))
    first, second = (statistics_of(*x, second_moment=2000.0) for x in zip(loss, own, strict=True))

    def taken(i, beta):
        left = loss[i] - (beta[..., None] * own[i]).sum(dim=1)
        return (loss[i].square() - left.square()).sum(dim=1)

    fit = fit_of(first)
    before = fit.coefficients
    expected = taken(0, torch.ones(3, 2, dtype=WIDE))
    torch.testing.assert_close(fit.reductions, expected / 2000)
    fit.add(second)
    expected = MEMORY * expected + taken(1, before)
    torch.testing.assert_close(fit.reductions, expected / (2000 * (1 + MEMORY)))
    assert not torch.allclose(taken(1, before), taken(1, fit.coefficients))


def test_coefficients_fitted_to_noise_look_good_on_it_but_not_on_the_next_pilot(z_score):
    """Gradients that have nothing in common: any coefficient but zero adds variance."""
    found = [[], []]
    for key in range(300):
        pilots = [
            statistics_of(
                normal(1, 20, key=("loss", key, i)), normal(1, 2, 20, key=("parts", key, i))
            )
            for i in range(2)
        ]
        fit = fit_of(pilots[0], bins=1)
        beta = fit.coefficients[0]
        for i, pilot in enumerate(pilots):
            square = beta @ pilot.squares[0] @ beta
            found[i].append(2 * beta @ pilot.products[0] - square)
        before = fit.reductions * 1000
        fit.add(pilots[1])
        judged = fit.reductions * 1000 * (1 + MEMORY) - MEMORY * before
        torch.testing.assert_close(judged[0], found[1][-1])
    assert z_score(torch.stack(found[0])) > 8
    assert z_score(torch.stack(found[1])) < -6


def test_sums_decay_from_pilot_to_pilot():
    pilots = [random_statistics(parts=2, key=key) for key in range(4)]
    fit = fit_of(*pilots)
    weights = [MEMORY ** (3 - i) for i in range(4)]
    products = sum(w * found.products for w, found in zip(weights, pilots, strict=True))
    squares = sum(w * found.squares for w, found in zip(weights, pilots, strict=True))
    expected = torch.linalg.solve(squares, products)
    torch.testing.assert_close(fit.coefficients, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.fractions, torch.full((3,), 1 / 3, dtype=WIDE))


def test_fractions_of_draws_are_means_over_pilots():
    share = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], dtype=WIDE)
    fit = fit_of(*(random_statistics(key=i, share=share[i]) for i in range(2)))
    torch.testing.assert_close(fit.fractions, (MEMORY * share[0] + share[1]) / (MEMORY + 1))


def best_by_trial(reductions, share, cost):
    """The bins of least second moment times cost, of all sets of bins, and their saving."""
    best, chosen = 0.0, ()
    for size in range(1, len(share) + 1):
        for bins in itertools.combinations(range(len(share)), size):
            left = 1 - sum(float(reductions[b]) for b in bins)
            seconds = 1 + cost.fixed + cost.marginal * sum(float(share[b]) for b in bins)
            if 1 / (left * seconds) > best:
                best, chosen = 1 / (left * seconds), bins
    return best, chosen


@pytest.mark.parametrize("cost", [Cost(0.0, 0.3), Cost(0.05, 1.0), Cost(0.3, 0.1)], ids=str)
def test_no_set_of_bins_would_save_more_than_those_that_open(cost):
    is_open, is_partly = 0, 0
    for key in range(60):
        share = normal(6, key=("share", key)).exp()
        share = share / share.sum()
        reductions = share * (0.2 + 0.5 * normal(6, key=("reduction", key))).clamp(max=0.9)
        fit = fit_of(of_reductions(reductions, share), bins=6, cost=cost)
        torch.testing.assert_close(fit.reductions, reductions)
        saving, bins = best_by_trial(reductions, share, cost)
        # a set that saves nothing is not opened, the best of these or not
        assert max(fit.predicted_speedup, 1.0) == pytest.approx(max(saving, 1.0))
        expected = torch.zeros(6, dtype=torch.bool)
        if saving > 1.05:
            expected[list(bins)] = True
        assert torch.equal(fit.is_open, expected)
        is_open += saving > 1.05
        is_partly += saving > 1.05 and len(bins) < 6
    assert 5 < is_open < 60
    assert is_partly > 5


@pytest.mark.parametrize(("reduction", "expected"), [(0.04, False), (0.06, True)])
def test_the_gate_opens_for_a_saving_over_five_percent(reduction, expected):
    share = torch.full((2,), 0.5, dtype=WIDE)
    fit = fit_of(of_reductions([reduction, 0.0], share), bins=2, cost=Cost(0.0, 0.0))
    assert bool(fit.is_open[0]) == expected
    assert fit.predicted_speedup == pytest.approx(1 / (1 - reduction))


def test_an_open_gate_closes_when_it_no_longer_pays():
    share = torch.full((2,), 0.5, dtype=WIDE)
    fit = fit_of(of_reductions([0.4, 0.0], share), bins=2, cost=Cost(0.0, 0.1))
    assert fit.is_open.tolist() == [True, False]
    # the coefficients that were fitted are 0.7 and 0.5, and now there is nothing in common
    nothing = of_reductions([-1.0, -1.0], share)
    for _ in range(5):
        fit.add(nothing)
    assert not fit.is_open.any()


def test_one_pilot_alone_does_not_close_the_gate():
    good, bad = (of_reductions([x] * 2, [0.5, 0.5]) for x in (0.4, -2.0))
    fit = fit_of(good, bins=2, cost=Cost(0.05, 0.2), coefficient=1.0)
    assert fit.is_open.all()
    fit.add(bad)
    assert fit.is_open.all()
    again = ControlFit(2, on_values=False, coefficient=1.0)
    again.load(json.loads(json.dumps(fit.state())))
    for one in (fit, again):
        one.add(bad)
        assert not one.is_open.any()
    for _ in range(12):
        fit.add(good)
    assert fit.is_open.all()


def test_bins_that_neither_save_nor_cost_do_not_open_and_close():
    first, second = (of_reductions([0.5, x], [0.5, 0.5]) for x in (1e-3, -5e-3))
    fit = fit_of(first, bins=2, cost=Cost(0.05, 0.0), coefficient=1.0)
    assert fit.is_open.tolist() == [True, True]
    fit.add(second)
    assert fit.is_open.tolist() == [True, True]


def test_without_a_known_cost_the_gate_stays_closed():
    share = torch.full((2,), 0.5, dtype=WIDE)
    assert not fit_of(of_reductions([0.4, 0.4], share), bins=2).is_open.any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_pilot_whose_gradients_overflow_is_left_out(value):
    """As gradients in float16 do now and then; the trainer leaves such steps out."""
    good, other = random_statistics(parts=2), random_statistics(parts=2, key=1)
    broken = good._replace(products=torch.full_like(good.products, value))
    fit, expected = fit_of(good, broken, other), fit_of(good, other)
    assert torch.equal(fit.coefficients, expected.coefficients)
    assert torch.equal(fit.reductions, expected.reductions)


@pytest.mark.parametrize("second_moment", [-1.0, 0.0, 1e-3])
def test_no_bin_that_does_harm_opens_where_the_second_moment_comes_out_too_small(second_moment):
    """Its estimate for a step of several batches is a difference, and unbiased."""
    share = torch.full((2,), 0.5, dtype=WIDE)
    found = of_reductions([-0.2, -0.2], share)
    found = found._replace(second_moment=torch.tensor(second_moment, dtype=WIDE))
    fit = fit_of(found, bins=2, cost=Cost(0.0, 0.1))
    assert not fit.is_open.any()
    assert (fit.reductions < 0).all()


def test_the_removed_noise_is_never_all_of_the_second_moment():
    loss = normal(2, 9, key=("loss",))
    found = statistics_of(loss, loss[:, None], second_moment=0.0)
    fit = fit_of(found, bins=2, cost=Cost(0.0, 0.0))
    assert 0.5 < float(fit.reductions.sum()) < 0.95
    assert fit.predicted_speedup == pytest.approx(float(1 / (1 - fit.reductions.sum())))


def test_a_fixed_coefficient_stays_and_is_judged():
    pilots = [random_statistics(key=i) for i in range(2)]
    fit = fit_of(*pilots, coefficient=0.25)
    assert torch.equal(fit.coefficients, torch.full((3, 1), 0.25, dtype=WIDE))
    first, second = (
        0.5 * found.products[:, 0] - 0.25**2 * found.squares[:, 0, 0] for found in pilots
    )
    torch.testing.assert_close(fit.reductions, (MEMORY * first + second) / (1000 * (1 + MEMORY)))


def test_the_coefficient_of_values_is_one_for_all_parts_and_from_values_alone():
    values = torch.tensor([[2.0, 3.0, 1.0], [4.0, 1.0, 0.0]], dtype=WIDE)
    more = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=WIDE)
    pilots = [random_statistics(parts=2, values=values), random_statistics(parts=2, values=more)]
    fit = fit_of(pilots[0], on_values=True)
    assert fit.coefficients.shape == (3, 1)
    assert fit.coefficients[:, 0].tolist() == [0.5, 3.0, 0.0]
    fit.add(pilots[1])
    expected = [(MEMORY * 2 + 1) / (MEMORY * 4 + 1), MEMORY * 3 / (MEMORY + 1), 0.0]
    assert fit.coefficients[:, 0].tolist() == pytest.approx(expected)
    # what it takes off is judged by gradients all the same
    beta = torch.tensor([0.5, 3.0, 0.0], dtype=WIDE)
    judged = [
        2 * b * found.products.sum(dim=1) - b**2 * found.squares.sum(dim=(1, 2))
        for b, found in zip([torch.ones(3, dtype=WIDE), beta], pilots, strict=True)
    ]
    expected = (MEMORY * judged[0] + judged[1]) / (1000 * (1 + MEMORY))
    torch.testing.assert_close(fit.reductions, expected)


@pytest.mark.parametrize("pilots", [0, 1, 3])
def test_its_state_is_plain_numbers_and_fits_continue_from_it(pilots):
    found = [random_statistics(parts=2, key=key) for key in range(pilots + 1)]
    cost = Cost(0.05, 0.2) if pilots else None
    fit = fit_of(*found[:-1], cost=cost)
    again = ControlFit(3, on_values=False, coefficient=None)
    again.load(json.loads(json.dumps(fit.state())))
    assert again.state() == fit.state()
    assert again.cost == cost
    for one in (fit, again):
        one.add(found[-1])
    assert torch.equal(fit.coefficients, again.coefficients)
    assert torch.equal(fit.is_open, again.is_open)
    assert torch.equal(fit.reductions, again.reductions)
    assert torch.equal(fit.fractions, again.fractions)
    assert fit.predicted_speedup == again.predicted_speedup


def test_a_fixed_coefficient_is_not_that_of_the_state():
    again = ControlFit(3, on_values=False, coefficient=0.25)
    again.load(fit_of(random_statistics()).state())
    assert torch.equal(again.coefficients, torch.full((3, 1), 0.25, dtype=WIDE))
