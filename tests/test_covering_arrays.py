"""Covering arrays hold every allowed combination, and are far fewer rows than all."""

import pytest
from support.covering_arrays import combinations_of, covering_array

FACTORS = {
    "estimator": ["plain", "stf", "carv", "taylor"],
    "precision": [32, 16, 8],
    **{switch: [False, True] for switch in "abcde"},
}


def anything(row):
    return True


def no_stf_in_half_precision(row):
    return not (row["estimator"] == "stf" and row["precision"] < 32)


@pytest.mark.parametrize("is_allowed", [anything, no_stf_in_half_precision])
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_an_allowed_row_is_in_a_chosen_one(strength, is_allowed):
    rows = covering_array(FACTORS, strength, is_allowed)
    everything = covering_array(FACTORS, len(FACTORS), is_allowed)
    expected = {each for row in everything for each in combinations_of(row, strength)}
    assert {each for row in rows for each in combinations_of(row, strength)} == expected
    assert all(is_allowed(row) for row in rows)


def test_at_full_strength_all_rows_are_chosen():
    assert len(covering_array(FACTORS, len(FACTORS), anything)) == 4 * 3 * 2**5


@pytest.mark.parametrize(("strength", "fewest"), [(1, 4), (2, 12), (3, 24)])
def test_rows_are_hardly_more_than_the_largest_factors_need(strength, fewest):
    assert fewest <= len(covering_array(FACTORS, strength, anything)) <= 1.5 * fewest


def test_an_array_is_the_same_each_time():
    assert covering_array(FACTORS, 3, anything) == covering_array(FACTORS, 3, anything)
