"""For which candidates a budget has the least repetitions."""

import pytest

from lightning_vr.auditing.least_repetitions import (
    LEAST_CANDIDATES,
    LEAST_REPETITIONS,
    affordable,
    still_needed,
)

FIRST, SECOND = LEAST_REPETITIONS


def test_a_first_look_needs_its_other_repetitions_and_those_of_five_finalists():
    # of ten candidates that take 2 seconds each, and the current estimator, which takes one
    expected = (FIRST - 1) * 21 + SECOND * 11
    assert still_needed([1.0] + [2.0] * 10, look=0) == pytest.approx(expected)
    assert still_needed([1.0] + [2.0] * 2, look=0) == (FIRST - 1 + SECOND) * 5
    assert still_needed([1.0, 2.0, 4.0], look=1) == (SECOND - 1) * 7
    assert still_needed([1.0], look=0) == FIRST - 1 + SECOND


def test_the_last_candidates_are_dropped_until_the_rest_fits():
    seconds = [1.0] + [2.0] * 10
    for count in range(LEAST_CANDIDATES[0], 11):
        left = still_needed(seconds[: count + 1], look=0)
        assert affordable(seconds, 0, left) == count
        assert affordable(seconds, 0, left - 1e-6) == max(count - 1, LEAST_CANDIDATES[0])


def test_a_few_candidates_stay_however_small_the_budget():
    assert affordable([1.0] * 9, 0, left=-5.0) == LEAST_CANDIDATES[0] == 3
    assert affordable([1.0] * 9, 1, left=-5.0) == LEAST_CANDIDATES[1] == 2
    assert affordable([1.0, 1.0], 0, left=-5.0) == 1
    assert affordable([1.0], 0, left=-5.0) == 0
