"""How long an audit takes, what it has no time for, and what it says of that."""

import logging
from types import SimpleNamespace

import pytest
from support.networks import small_mlp

from lightning_vr import CARV, STF, Candidate, DiffusionModule, audit
from lightning_vr.auditing.candidate_measurement import CandidateMeasurement
from lightning_vr.auditing.least_repetitions import LEAST_REPETITIONS
from lightning_vr.auditing.report import not_measured
from lightning_vr.core import devices
from lightning_vr.data import EightGaussians

pytestmark = pytest.mark.filterwarnings("ignore:.*`max_epochs`")

RIVALS = [
    Candidate("all", target=STF("all")),
    Candidate("batch", target=STF("batch")),
    Candidate("strata", draws=CARV(1)),
    Candidate("pairs", draws=CARV(2, antithetic=True)),
    Candidate("4 resamples", draws=CARV(4)),
]
"""A look at the clock lasts a second, and so does a step of each of them (conftest)."""


def audited(rivals, budget):
    module = DiffusionModule(small_mlp(width=16, std=0.1))
    data = EightGaussians(batch_size=32, num_samples=512, num_validation=32)
    return audit(module, data, rivals, budget=budget, progress=False)


def test_what_the_budget_is_too_small_for_is_dropped_and_named(caplog):
    with caplog.at_level(logging.INFO):
        found = audited(RIVALS, budget=2)
    names = [each.name for each in found.estimators]
    assert names[:4] == ["current", "all", "batch", "strata"]
    assert not {"pairs", "4 resamples"} & set(names)
    assert (found.repetitions, found.second_repetitions) == LEAST_REPETITIONS
    lines = not_measured(found)
    assert lines[0] == "Not measured: pairs: the budget of 2 s is too small."
    assert lines[1] == "Not measured: 4 resamples: the budget of 2 s is too small."
    # what was measured in the first look alone is in the table
    assert not any(line.startswith("Not measured: all:") for line in lines)
    (said,) = (each for each in caplog.messages if "needs about" in each)
    assert "more than its budget of 2 s, for the least repetitions of 4 estimators" in said


def test_a_budget_that_suffices_is_spent_and_nothing_is_said(caplog, capsys, recwarn):
    with caplog.at_level(logging.INFO):
        found = audited(RIVALS[:1], budget=55)
    assert found.repetitions > 2 * LEAST_REPETITIONS[0]
    assert found.second_repetitions > LEAST_REPETITIONS[1]
    assert 55 <= found.seconds <= 65
    assert found.skipped == {}
    # nor of a training that does not take place
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
    assert not recwarn
    assert not any("needs about" in each for each in caplog.messages)


class Busy:
    """A clock of a machine on which other work delays single repetitions of an STF."""

    def __init__(self):
        self.now, self.delay = 0.0, 0.0

    def __call__(self):
        self.now += 1.0 + self.delay
        return self.now


def test_slow_timings_do_not_decide_what_is_looked_at_again(monkeypatch):
    clock, repeat = Busy(), CandidateMeasurement.repeat

    def disturbed(self, comparison, candidates, pair, number, *rest):
        for candidate in candidates:
            is_slow = number < LEAST_REPETITIONS[0] - 1 and candidate.name == "all"
            clock.delay = 100.0 if is_slow else 0.0
            repeat(self, comparison, [candidate], pair, number, *rest)

    monkeypatch.setattr(CandidateMeasurement, "repeat", disturbed)
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=clock))
    found = audited([RIVALS[0], RIVALS[2]], budget=2)
    # the two that are expected to save most: for the second look of others there is no time
    assert {each.name for each in found.finalists} == {"all", "all, strata"}
    assert all(each.seconds == found.current.seconds for each in found.finalists)
