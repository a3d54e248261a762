"""A run that is stopped at any place in any way, and resumed, is the run that was not stopped.

All that a position within an epoch depends on is crossed: the hook, how the run ends, when it
validates, how many batches an optimizer step takes, averages of weights, and loader processes.
"""

import logging
from collections import Counter
from itertools import product

import pytest
import torch
from stopped_runs import (
    ENDS,
    FACTORS,
    SOME_PLACES,
    cannot_be_exact,
    is_allowed,
    outcome,
    stop_and_resume,
)
from support.covering_arrays import covering_array

WITH_WORKERS = [place for place in SOME_PLACES if "batch_start" in place or "end" in place[-14:]][
    ::2
]
FEW = covering_array(
    FACTORS | {"place": SOME_PLACES},
    2,
    # processes take time to start and to end
    lambda row: is_allowed(row) and (row["workers"] == 0 or row["place"] in WITH_WORKERS),
)
ALL = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Nobody reads what Lightning says."""
    logging.disable(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder_of_whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def check(rows, folder, folder_of_whole):
    figures, wrong = Counter(), []
    for number, row in enumerate(rows):
        own = folder / str(number)
        own.mkdir()
        try:
            run = stop_and_resume(own, row)
            found = outcome(folder_of_whole, run, row)
            expected = "warned" if cannot_be_exact(row) and run.is_resumed else "exact"
            assert found == expected
        except Exception as error:
            found = "wrong"
            wrong.append(f"{row}: {type(error).__name__} {error}")
        figures[found] += 1
    print(f"{len(rows)} runs: {dict(figures)}")
    assert not wrong, f"{dict(figures)} of {len(rows)} runs:\n" + "\n".join(wrong[:20])


def test_the_array_has_two_hundred_runs_with_all_hooks():
    assert len(FEW) >= 200
    hooks = {place.split()[0] for place in FACTORS["place"]}
    assert {row["place"].split()[0] for row in FEW} == hooks


@pytest.mark.parametrize("end", ENDS)
def test_a_resumed_run_is_exact_or_says_that_it_is_not(end, tmp_path, folder_of_whole):
    check([row for row in FEW if row["end"] == end], tmp_path, folder_of_whole)


@pytest.mark.slow
@pytest.mark.parametrize("place", FACTORS["place"])
def test_a_resumed_run_is_exact_or_says_so_in_all_combinations(place, tmp_path, folder_of_whole):
    rows = [row for row in ALL if row["place"] == place and is_allowed(row)]
    check(rows, tmp_path, folder_of_whole)
