"""Which candidates are looked at again, and what of them is combined."""

import math
from types import SimpleNamespace

from lightning_vr.auditing.candidates import Candidate
from lightning_vr.auditing.finalists import finalists
from lightning_vr.auditing.least_repetitions import MOST_FINALISTS
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.variance.intervals import Interval

CANDIDATES = [
    Candidate("STF(64)", target=STF(64)),
    Candidate("STF(256)", target=STF(256)),
    Candidate("q", draws=CARV(1, LearnedProposal())),
    Candidate("pairs", draws=CARV(2, antithetic=True)),
    Candidate("Taylor 0", control_variate=TaylorCV()),
]


def chosen(**savings):
    """Finalists if the first look expects these savings, by the number of the candidate."""
    values = [savings.get(f"_{i}", 0.5) for i in range(len(CANDIDATES))]
    measured = {
        c.name: SimpleNamespace(predicted_speedup=Interval(x, x / 1.2, x * 1.2))
        for c, x in zip(CANDIDATES, values, strict=True)
    }
    expected = {c.name: x for c, x in zip(CANDIDATES, values, strict=True)}
    fresh = {c.name: c for c in CANDIDATES}
    return {c.name: c for c in finalists(CANDIDATES, fresh, measured, expected)}


def test_what_surely_loses_is_not_looked_at_again():
    assert chosen() == {}
    assert list(chosen(_0=0.87)) == []
    assert list(chosen(_0=0.88)) == ["STF(64)"]


def test_winners_of_different_slots_are_combined_and_those_that_save_most_come_first():
    found = chosen(_0=1.1, _1=1.3, _2=1.4, _4=1.2)
    assert list(found) == [
        "STF(256), q, Taylor 0",
        "STF(256), q",
        "q, Taylor 0",
        "STF(256), Taylor 0",
        "STF(256)",
    ]
    assert len(found) == MOST_FINALISTS
    both = found["STF(256), q"]
    # references are encoded once, proposals learn anew
    assert both.target is CANDIDATES[1].target
    assert both.draws is not CANDIDATES[2].draws
    assert set(both.slots()) == {"target", "draws"}
    assert isinstance(found["STF(256), q, Taylor 0"].control_variate, TaylorCV)


def test_long_draws_that_win_and_short_ones_are_both_combined_with_the_target():
    found = chosen(_0=1.2, _2=1.1, _3=1.5)
    assert {"STF(64), pairs", "STF(64), q", "STF(64)", "pairs", "pairs, q"} == set(found)


def test_pairs_are_combined_with_a_proposal_that_pays():
    draws = chosen(_2=1.2, _3=1.3)["pairs, q"].draws
    assert draws.antithetic
    assert draws.draws_per_sample == 2
    assert isinstance(draws.proposal, LearnedProposal)


def test_what_is_not_resolved_comes_last():
    assert list(chosen(_0=math.nan)) == []
    unresolved = SimpleNamespace(predicted_speedup=Interval(math.nan, 0.0, math.inf))
    sure = SimpleNamespace(predicted_speedup=Interval(1.1, 1.0, 1.2))
    names = {c.name: c for c in CANDIDATES[:2]}
    measured = dict(zip(names, (unresolved, sure), strict=True))
    expected = dict(zip(names, (math.nan, 1.1), strict=True))
    found = finalists(CANDIDATES[:2], names, measured, expected)
    assert [c.name for c in found] == ["STF(256)", "STF(64)"]
