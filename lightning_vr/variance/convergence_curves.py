"""What one validation found at each noise level, with standard errors, and what it means in all.

Everything is kept as means of 16 blocks of samples: whatever is compared, the two sides are paired
by block, so that noise which both share drops out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.validation import check_saved_tensor
from lightning_vr.variance.target_curves import MeasuredCurve

BOUNDS = ("low", "middle", "high")


@dataclass(frozen=True)
class Floors:
    """Irreducible losses, which do not change in a run, as block means ``(L, blocks)``.

    Attributes:
        noise_levels: ``(L,)``.
        edges: Noise levels between the bins ``(L - 1,)``.
        low: Of the training set, or a lower bound.
        middle: The estimate between the bounds: the same as ``low`` where it is exact.
        high: An upper bound.
        unseen: Standard error that the scatter of draws does not show ``(L,)``: rare events that
            none of them met, or the choice of a subset.
        resolution: Excess loss that may be rounding ``(L,)``.
        held_out_low: Lower bound of the irreducible loss of held-out data, or None without any.
        held_out_high: The held-out loss of the training set's own optimum, an upper bound.
    """

    noise_levels: Tensor
    edges: Tensor
    low: Tensor
    middle: Tensor
    high: Tensor
    unseen: Tensor
    resolution: Tensor
    held_out_low: Tensor | None = None
    held_out_high: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the irreducible loss of the training set is known, and not bracketed."""
        return torch.equal(self.low, self.high)


@dataclass(frozen=True)
class Record:
    """One validation, as block means ``(L, blocks)``.

    Attributes:
        step: Optimizer steps before it.
        direct: ``λ ‖x0_hat - D₁‖² / d`` at the training draws.
        held_out: Loss at the held-out draws, or None without any.
    """

    step: int
    direct: Tensor
    held_out: Tensor | None


class LossCurves(NamedTuple):
    """Losses of one validation and their parts, at each noise level ``(L,)`` or in all ``(1,)``.

    Attributes:
        loss: Training loss with the plain target.
        floor: Its irreducible part.
        floor_low: Lower bound of it; the same where it is exact.
        floor_high: Upper bound: no more than the loss itself.
        excess: Loss less floor: the distance from the optimum.
        excess_low: Lower bound of it.
        excess_high: Upper bound of it.
        held_out: Loss of held-out data, or None without any.
        held_out_floor_low: Lower bound of its irreducible part.
        held_out_floor_high: Held-out loss of the training set's optimum.
    """

    loss: MeasuredCurve
    floor: MeasuredCurve
    floor_low: MeasuredCurve
    floor_high: MeasuredCurve
    excess: MeasuredCurve
    excess_low: MeasuredCurve
    excess_high: MeasuredCurve
    held_out: MeasuredCurve | None
    held_out_floor_low: MeasuredCurve | None
    held_out_floor_high: MeasuredCurve | None

    def columns(self) -> dict[str, Tensor]:
        """Return every curve and its standard error by name."""
        found = {name: curve for name, curve in self._asdict().items() if curve is not None}
        return {
            name + suffix: values
            for name, curve in found.items()
            for suffix, values in (("", curve.mean), ("_error", curve.error))
        }


def measured(blocks: Tensor, extra: Tensor | float = 0.0) -> MeasuredCurve:
    """Return the mean of blocks ``(*, blocks)`` and its standard error, with an ``extra`` part."""
    error = blocks.std(dim=-1) / math.sqrt(blocks.shape[-1])
    return MeasuredCurve(blocks.mean(dim=-1), torch.hypot(error, torch.as_tensor(extra).to(error)))


def loss_curves(floors: Floors, record: Record, *, in_all: bool = False) -> LossCurves:
    """Return the curves of one validation.

    Args:
        floors: The irreducible losses.
        record: What the validation found.
        in_all: Whether to average over noise levels, which are equally likely.
    """

    def part(blocks: Tensor) -> Tensor:
        return blocks.mean(dim=0, keepdim=True) if in_all else blocks

    low, middle, high = (part(getattr(floors, name)) for name in BOUNDS)
    direct, unseen = part(record.direct), part(floors.unseen)
    resolution = part(floors.resolution)
    loss, held_out = direct + low, None if record.held_out is None else part(record.held_out)
    others = [None if x is None else part(x) for x in (floors.held_out_low, floors.held_out_high)]
    excess = measured(direct + (low - middle), resolution)
    upper = measured(direct, resolution)
    return LossCurves(
        measured(loss, unseen),
        measured(middle, unseen),
        measured(low, unseen),
        _smaller(measured(high, unseen), measured(loss, unseen)),
        _smaller(_not_negative(excess), upper),
        _not_negative(measured(direct + (low - high), resolution)),
        upper,
        *(None if x is None else measured(x) for x in (held_out, *others)),
    )


def _not_negative(curve: MeasuredCurve) -> MeasuredCurve:
    return MeasuredCurve(curve.mean.clamp(min=0), curve.error)


def _smaller(curve: MeasuredCurve, other: MeasuredCurve) -> MeasuredCurve:
    is_smaller = ~(curve.mean > other.mean)  # an unknown bound stays unknown
    return MeasuredCurve(
        *(torch.where(is_smaller, x, y) for x, y in zip(curve, other, strict=True))
    )


def records_state(records: list[Record]) -> dict[str, Tensor | None]:
    """Return records as tensors, for a checkpoint."""
    if not records:
        return {"steps": torch.zeros(0, dtype=torch.int64), "direct": None, "held_out": None}
    held_out = [record.held_out for record in records if record.held_out is not None]
    return {
        "steps": torch.tensor([record.step for record in records]),
        "direct": torch.stack([record.direct for record in records]),
        "held_out": torch.stack(held_out) if held_out else None,
    }


def records_from(state: Mapping[str, Any]) -> list[Record]:
    """Return the records that ``records_state`` has returned.

    Raises:
        ValueError: If they are none.
    """
    steps, direct, held_out = (state[name] for name in ("steps", "direct", "held_out"))
    if direct is None:
        return []
    for name, x in (("direct", direct), ("held_out", held_out)):
        if x is not None:
            check_saved_tensor(name, x, (len(steps), *direct.shape[1:]))
    others = [None] * len(direct) if held_out is None else list(held_out)
    return [
        Record(int(step), *parts)
        for step, *parts in zip(steps.tolist(), direct, others, strict=True)
    ]
