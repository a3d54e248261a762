"""Few of the cases of a test, for every run of the tests; the others are for `-m slow`."""

import pytest


def mostly_slow(cases, quick):
    """Return all cases, with those that are not among the ``quick`` ones marked as slow."""
    assert all(each in cases for each in quick)
    marks = [pytest.mark.slow]
    return [
        each
        if each in quick
        else pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=marks)
        for each in cases
    ]
