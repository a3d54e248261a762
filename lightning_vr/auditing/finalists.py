"""Finalists of an audit: what the first look leaves open, and combinations of its winners.

The best of many candidates owes a part of its lead to luck. So a second look on fresh draws decides
(the winner's curse: Thaler 1988), and fewer candidates share its seconds and its level.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

from lightning_vr.auditing.candidates import Candidate
from lightning_vr.auditing.least_repetitions import MOST_FINALISTS
from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.auditing.result import LEAST_GAIN
from lightning_vr.estimators.carv import CARV


def finalists(
    candidates: Sequence[Candidate],
    fresh: Mapping[str, Candidate],
    measured: Mapping[str, MeasuredEstimator],
    expected: Mapping[str, float],
) -> list[Candidate]:
    """Return the candidates to look at again, those that are expected to save most first.

    Open is what may still save enough, by its interval or by what is expected. The best open
    candidates of different slots are combined, and antithetic pairs with the proposal of other
    draws; a combination is expected to save the product of what its parts save.

    Args:
        candidates: Those of the first look, as they were measured.
        fresh: The same by name, as they were before they learned: what draws and control variates
            learn depends on what they are combined with.
        measured: What the first look says of each, by name.
        expected: What each is expected to save, whatever other work the machine had.
    """
    open_ = [
        c
        for c in candidates
        if max(measured[c.name].predicted_speedup.high, expected[c.name]) > LEAST_GAIN
    ]
    open_.sort(key=lambda c: -expected[c.name])
    ranked = [(expected[c.name], c) for c in open_]
    known = {c.name for c in candidates}
    for parts in _combinations(open_):
        combined = _combined(parts, fresh)
        if combined.name not in known:
            known.add(combined.name)
            ranked.append((math.prod(expected[part.name] for part in parts), combined))
    # NaN, of what is not resolved, counts as least
    ranked.sort(key=lambda pair: -pair[0] if pair[0] > 0 else 0.0)
    return _with_target_alone([c for _, c in ranked[:MOST_FINALISTS]], open_)


def _with_target_alone(chosen: list[Candidate], open_: list[Candidate]) -> list[Candidate]:
    """Let the target of a combination stand beside it, which tells what its draws add."""
    combined = [c for c in chosen if c.target is not None and c.draws is not None]
    alone = [c for c in open_ if set(c.slots()) == {"target"}]
    missing = [c for c in alone if any(c.target is x.target for x in combined) and c not in chosen]
    return [*chosen[: MOST_FINALISTS - len(missing)], *missing]


def _combinations(ranked: list[Candidate]) -> Iterator[tuple[Candidate, ...]]:
    """Yield the winners of slots in pairs, and of all slots together."""
    single = {
        slot: [c for c in ranked if set(c.slots()) == {slot}]
        for slot in ("target", "draws", "control_variate", "views")
    }
    draws = single["draws"]
    # one that is longer may win alone, and one that is not with another target
    shortest = min((c.draws.draws_per_sample for c in draws if c.draws), default=1)
    short = [c for c in draws if c.draws and c.draws.draws_per_sample == shortest][:1]
    targets, controls = single["target"][:1], single["control_variate"][:1]
    best_draws = draws[:1] + [c for c in short if c not in draws[:1]]
    yield from ((a, b) for a in targets for b in (*best_draws, *controls))
    yield from ((a, b) for a in short for b in controls)
    yield from ((a, b) for a in single["views"][:1] for b in best_draws)
    yield from ((a, b, c) for a in targets for b in short for c in controls)
    yield from (
        (a, b)
        for a in draws
        for b in draws
        if a is not b and _is_plain_pairs(a) and _has_proposal(b)
    )


def _combined(parts: tuple[Candidate, ...], fresh: Mapping[str, Candidate]) -> Candidate:
    name = ", ".join(part.name for part in parts)
    if {slot for part in parts for slot in part.slots()} == {"draws"}:
        pairs, other = (copy.deepcopy(fresh[part.name].draws) for part in parts)
        assert isinstance(pairs, CARV)
        assert isinstance(other, CARV)
        pairs.proposal = other.proposal
        return Candidate(name, draws=pairs)
    slots = {
        slot: copy.deepcopy(getattr(fresh[p.name], slot)) for p in parts for slot in _others(p)
    }
    # references are encoded once
    targets = [part.target for part in parts if part.target is not None]
    return Candidate(name, target=targets[0] if targets else None, **slots)


def _others(candidate: Candidate) -> set[str]:
    return set(candidate.slots()) - {"target"}


def _is_plain_pairs(candidate: Candidate) -> bool:
    draws = candidate.draws
    return isinstance(draws, CARV) and draws.antithetic is not False and draws.proposal is None


def _has_proposal(candidate: Candidate) -> bool:
    draws = candidate.draws
    return isinstance(draws, CARV) and draws.antithetic is False and draws.proposal is not None
