"""The least repetitions of the looks of an audit, and the candidates for which a budget has them.

Candidates stand in an order: the default ones, and those of a file, with the most promising first,
and finalists with the one that is expected to save most. Where the budget is too small for the
least repetitions of all, the last ones are dropped until it suffices or only a few are left.
"""

from collections.abc import Sequence

LEAST_REPETITIONS = (3, 5)
"""Of the first and of the second look, however small the budget."""

MOST_FINALISTS = 5

LEAST_CANDIDATES = (3, 2)
"""Of the first and of the second look, however small the budget."""


def still_needed(seconds: Sequence[float], look: int) -> float:
    """Return the seconds that an audit still needs after the first repetition of a look.

    Args:
        seconds: Of a repetition of each estimator in the look, the current one first.
        look: 0 for the first look, after which finalists are taken to be as long as the mean.
    """
    repetition, rest = sum(seconds), LEAST_REPETITIONS[look] - 1
    if look == 1:
        return rest * repetition
    current, *rivals = seconds
    finalists = min(MOST_FINALISTS, len(rivals)) * sum(rivals) / max(1, len(rivals))
    return rest * repetition + LEAST_REPETITIONS[1] * (current + finalists)


def affordable(seconds: Sequence[float], look: int, left: float) -> int:
    """Return for how many candidates the seconds that are left suffice, at least for a few.

    Args:
        seconds: Of a repetition of each estimator in the look, the current one first.
        look: 0 for the first look, 1 for the second one.
        left: Seconds that are left of the budget.
    """
    count = len(seconds) - 1
    while count > LEAST_CANDIDATES[look] and still_needed(seconds[: count + 1], look) > left:
        count -= 1
    return count
