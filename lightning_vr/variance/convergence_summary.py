"""What the validations of a run say, in plain sentences.

Each sentence beyond the first is said only if it holds by three standard errors, paired by block of
samples. Noise levels are equally likely bins, so that shares are those of the loss that trains.
"""

import math

import torch
from torch import Tensor

from lightning_vr.variance.convergence_curves import (
    Floors,
    LossCurves,
    Record,
    loss_curves,
    measured,
)

_ERRORS = 3.0
"""Standard errors by which a sentence must hold."""

_NEAR = 0.05
"""Fraction of the loss below which what is missing to the floor is called none."""

_MOST = 2 / 3
"""Fraction of a quantity that the noise levels it is said to lie at hold."""

Range = tuple[int, int]
"""Numbers of the first and the last of some consecutive noise levels."""


def summarize(floors: Floors, records: list[Record]) -> str:
    """Return the sentences of a run, the first about its last validation."""
    if not records:
        return "Nothing has been measured yet."
    last = records[-1]
    if not bool(last.direct.isfinite().all()):
        where = _ranges(~last.direct.isfinite().all(dim=1))
        return f"At step {last.step} the loss is not finite {_joined(floors, where)}."
    sentences = [
        _state(floors, last),
        *_at_floor(floors, last),
        *_distance(floors, last),
        *_trend(floors, records),
        *_held_out(floors, records),
    ]
    return " ".join(sentences)


def _state(floors: Floors, last: Record) -> str:
    found = loss_curves(floors, last, in_all=True)
    start = f"At step {last.step} the training loss is {_number(found.loss.mean)}"
    held_out = found.held_out
    end = "" if held_out is None else f"; the held-out loss is {_number(*held_out)}"
    if bool(found.floor.mean.isnan()):
        unknown = "how much of it can be removed is unknown, as no two samples share a condition"
        return f"{start}: {unknown}{end}."
    excess = _number(*found.excess)
    if not floors.is_exact:
        bounds = _number(found.excess_low.mean), _number(found.excess_high.mean)
        excess = f"{excess} (between {bounds[0]} and {bounds[1]})"
    return f"{start}, of which {excess} is its distance from the optimum{end}."


def _at_floor(floors: Floors, last: Record) -> list[str]:
    near = _ranges(_is_near(floors, loss_curves(floors, last)))
    if not near:
        return []
    return [f"{_joined(floors, near).capitalize()} it is at its floor."]


def _is_near(floors: Floors, curves: LossCurves) -> Tensor:
    upper = curves.excess_high.mean + 2 * curves.excess_high.error
    return (upper <= _NEAR * curves.loss.mean) | (upper <= 4 * floors.resolution)


def _distance(floors: Floors, last: Record) -> list[str]:
    curves = loss_curves(floors, last)
    excess = last.direct + (floors.low - floors.middle)
    if bool(_is_near(floors, curves).all()) or not _is_positive(excess.mean(dim=0)):
        return []
    found = _most_of(excess)
    if found is None:
        return []
    inside = torch.zeros(len(excess), dtype=torch.bool)
    inside[found[0] : found[1] + 1] = True
    least = curves.excess_low.mean[inside].sum()
    most = curves.excess_high.mean[~inside].sum()
    if not float(least / (least + most)) > float(inside.double().mean()):
        return []  # the bracket leaves open where it lies
    share = excess[inside].mean(dim=1).sum() / excess.mean(dim=1).sum()
    where = _name(floors, found)
    return [f"{100 * float(share):.0f} % of the distance lies at noise levels {where}."]


def _trend(floors: Floors, records: list[Record]) -> list[str]:
    last = records[-1]
    earlier = [record for record in records[:-1] if record.step <= last.step / 2] or records[:1]
    before = earlier[-1]
    if before.step == last.step or bool(_is_near(floors, loss_curves(floors, last)).all()):
        return []
    change = (last.direct - before.direct).mean(dim=0)
    whole = (before.direct + (floors.low - floors.middle)).mean(dim=0)
    start, verb = f"Since step {before.step} it has", "fallen" if change.mean() < 0 else "risen"
    if not bool(_is_positive(change.mean().sign() * change)):
        return [f"{start} not changed beyond its standard error."]
    if not float(whole.mean()) > 0:
        return [f"{start} {verb}."]
    ratio = change.mean() / whole.mean()
    error = measured(change - ratio * whole).error / whole.mean()
    part = 100 * abs(float(ratio))
    return [f"{start} {verb} by {part:.0f} ± {max(100 * float(error), 1):.0f} %."]


def _held_out(floors: Floors, records: list[Record]) -> list[str]:
    found = [(record, record.held_out) for record in records if record.held_out is not None]
    if not found:
        return []
    sentences = [*_gap_opens(floors, found)]
    last, held_out = found[-1]
    if floors.held_out_high is not None and not bool(floors.held_out_high.isnan().any()):
        better = _is_positive(floors.held_out_high - held_out)
        if bool(better.any()):
            where = _joined(floors, _ranges(better))
            sentences.append(
                f"{where.capitalize()} held-out data are denoised better than by the training "
                f"set's optimum: to come closer to it there would be memorisation."
            )
    copied = _is_memorised(floors, last, held_out)
    if bool(copied.any()):
        where = _joined(floors, _ranges(copied))
        sentences.append(f"{where.capitalize()} the training samples are memorised.")
    return sentences


def _gap_opens(floors: Floors, records: list[tuple[Record, Tensor]]) -> list[str]:
    """Say since when the held-out loss rises while the training loss falls."""
    last, now = records[-1]
    best, lowest = min(records, key=lambda each: float(each[1].mean()))
    rise = now - lowest
    falls = _is_positive((best.direct - last.direct).mean(dim=0))
    if best is last or not _is_positive(rise.mean(dim=0)) or not bool(falls):
        return []
    found = _most_of(rise)
    where = "" if found is None else f", mostly {_name(floors, found)}"
    change = _number(*measured(rise.mean(dim=0)))
    return [
        f"The held-out gap opens since step {best.step}: the held-out loss has risen by {change}"
        f"{where}, while the training loss has fallen."
    ]


def _is_memorised(floors: Floors, last: Record, held_out: Tensor) -> Tensor:
    """Return at which levels the network is near the training set's optimum and far off others.

    That is where its distance is less than a quarter of the gap between held-out and training loss.
    """
    gap = held_out - (last.direct + floors.low)
    return _is_positive(gap) & _is_positive(gap / 4 - last.direct)


def _most_of(blocks: Tensor) -> Range | None:
    """Return the fewest consecutive levels that hold most of ``blocks (L, blocks)``, or None.

    None is returned if they hold no more of it than of the levels, beyond the standard error.
    """
    count, total = len(blocks), blocks.sum(dim=0)
    sums = torch.cat([torch.zeros_like(total)[None], blocks.cumsum(dim=0)])
    best: tuple[int, float, Range] | None = None
    for first in range(count):
        for last in range(first, count):
            inside = sums[last + 1] - sums[first]
            share = float(inside.mean() / total.mean())
            candidate = (last - first, -share, (first, last))
            if share >= _MOST and (best is None or candidate < best):
                best = candidate
    if best is None:
        return None
    first, last = best[2]
    inside = sums[last + 1] - sums[first]
    beyond = inside - (last - first + 1) / count * total
    return best[2] if _is_positive(beyond) else None


def _is_positive(blocks: Tensor) -> Tensor:
    """Return whether the mean of blocks ``(*, blocks)`` is above 0 beyond its standard error."""
    curve = measured(blocks)
    return curve.mean > _ERRORS * curve.error


def _ranges(mask: Tensor) -> list[Range]:
    """Return the runs of consecutive levels for which ``mask (L,)`` is true."""
    found: list[Range] = []
    for i, value in enumerate(mask.tolist()):
        if value and found and found[-1][1] == i - 1:
            found[-1] = (found[-1][0], i)
        elif value:
            found.append((i, i))
    return found


def _joined(floors: Floors, ranges: list[Range]) -> str:
    names = [_name(floors, each) for each in ranges]
    if names == ["at all noise levels"]:
        return names[0]
    return "at noise levels " + " and ".join(names)


def _name(floors: Floors, found: Range) -> str:
    """Return where some consecutive levels lie: the outermost bins are open."""
    low = None if found[0] == 0 else f"{float(floors.edges[found[0] - 1]):.2g}"
    high = None if found[1] == len(floors.edges) else f"{float(floors.edges[found[1]]):.2g}"
    if low is None and high is None:
        return "at all noise levels"
    if low is None or high is None:
        return f"above {low}" if high is None else f"below {high}"
    return f"between {low} and {high}"


def _number(mean: Tensor, error: Tensor | None = None) -> str:
    """Return a number, with its standard error if given, of as many digits as it has."""
    value = float(mean)
    if error is None or not 0 < float(error) < math.inf:
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(float(error))))
    if digits > 8:
        return f"{value:.2g} ± {float(error):.1g}"
    return f"{value:.{digits}f} ± {float(error):.{digits}f}"
