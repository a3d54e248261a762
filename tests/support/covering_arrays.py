"""Few combinations of factors in which each combination of some of them occurs.

A covering array of strength t holds, for every t factors, every combination of their values at
least once: an error that t factors make together is met, whatever the others are. The rows are
chosen greedily, each the one that covers most of what is not covered yet (the scheme of AETG:
Cohen, Dalal, Fredman and Patton 1997, "The AETG system: an approach to testing based on
combinatorial design"), here among all rows, so that nothing is left to chance.
"""

import heapq
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def covering_array(
    factors: dict[str, list[Any]], strength: int, is_allowed: Callable[[Row], bool]
) -> list[Row]:
    """Return allowed rows that cover every combination which some allowed row has."""
    rows = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    rows = [row for row in rows if is_allowed(row)]

    numbers: dict[tuple[Any, ...], int] = {}
    masks = [_mask(row, strength, numbers) for row in rows]
    missing = (1 << len(numbers)) - 1
    # what a row would cover only shrinks: counts that are out of date are upper bounds
    counts = [(-mask.bit_count(), i) for i, mask in enumerate(masks)]
    heapq.heapify(counts)
    chosen = []
    while missing:
        count, best = heapq.heappop(counts)
        covered = (masks[best] & missing).bit_count()
        if covered < -count:
            heapq.heappush(counts, (-covered, best))
            continue
        chosen.append(rows[best])
        missing &= ~masks[best]
    return chosen


def combinations_of(row: Row, strength: int) -> Iterable[tuple[tuple[str, Any], ...]]:
    """Return each combination of some factors of a row, with their values."""
    return combinations(row.items(), strength)


def _mask(row: Row, strength: int, numbers: dict[tuple[Any, ...], int]) -> int:
    """Return the combinations of a row as bits."""
    found = (numbers.setdefault(each, len(numbers)) for each in combinations_of(row, strength))
    return sum(1 << number for number in found)
