"""What is not finite in an optimizer step: a weight, a sample, a loss or a gradient, and where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_vr.core.distributed import gather_objects, rank, world_size
from lightning_vr.core.rows import leaves
from lightning_vr.core.sharding import local
from lightning_vr.core.types import DrawEstimate, Noised

_ADVICE = {
    "sample_is_finite": "is not finite: remove it from the data or fix `encode`.",
    "loss_is_finite": "has a loss that is not: lower the learning rate, clip gradients, or train "
    "with more precision.",
}


@dataclass(frozen=True)
class BatchRecord:
    """What is kept of a micro-step until its optimizer step is looked at, by draw."""

    number: int
    sample_is_finite: Tensor
    loss_is_finite: Tensor
    noise_level: Tensor
    index: Tensor | None

    @classmethod
    def of(cls, estimate: DrawEstimate, number: int) -> "BatchRecord":
        """Note which draws are finite, without waiting for the device."""
        noised = estimate.noised
        terms = (estimate.per_draw, estimate.control, estimate.bound)
        is_finite = torch.stack([x for x in terms if x is not None]).isfinite().all(dim=0)
        return cls(number, _is_finite(noised), is_finite, noised.noise_level, noised.index)


@dataclass(frozen=True)
class StepRecord:
    """What is kept of an optimizer step until it is looked at.

    Attributes:
        number: Its number.
        batches: Its micro-steps.
        gradients: Names of the parameters that have a gradient.
        is_finite: Whether the norm of each of these is finite ``(g,)``, or None.
    """

    number: int
    batches: Sequence[BatchRecord] = ()
    gradients: Sequence[str] = ()
    is_finite: Tensor | None = None

    def cause(self, module: nn.Module) -> tuple[str | None, str]:
        """Return the weight that no further step mends, if any, and what is not finite in words.

        All ranks call it.
        """
        weight = first_of_ranks(first_broken_weight(module))
        culprit = first_of_ranks(self._first_culprit())
        if weight is not None:
            # a sample can break running statistics
            is_sample = culprit is not None and culprit[0] == 0
            return weight, name_weight(weight) + (f" Besides, {culprit[1]}" if is_sample else "")
        if culprit is not None:
            return None, culprit[1]
        gradient = first_of_ranks(self._first_gradient())
        if gradient is None:
            return None, "a loss overflows: lower the learning rate."
        # of modules of other kinds no draws are known
        but = ", though every loss is finite" if self.batches else ""
        advice = "clip gradients, lower the learning rate, or train with more precision."
        if not self.batches:
            advice = f"look for NaN in the data and the loss, {advice}"
        return None, f"the gradient of `{gradient}`{but}: {advice}"

    def _first_culprit(self) -> tuple[int, str] | None:
        """Return the first sample, or else the first loss, that is not finite, with its rank."""
        # a sample among the references spoils the losses of others
        for severity, (kind, advice) in enumerate(_ADVICE.items()):
            for batch in self.batches:
                is_finite = getattr(batch, kind)
                if not bool(is_finite.all()):
                    row = int((~is_finite).nonzero()[0])
                    return severity, f"{_place(batch, row)} {advice}"
        return None

    def _first_gradient(self) -> str | None:
        """Return the parameter whose gradient, or this rank's rows of it, is not finite."""
        flags = [] if self.is_finite is None else self.is_finite.tolist()
        return next((name for name, ok in zip(self.gradients, flags, strict=True) if not ok), None)


def name_weight(name: str) -> str:
    """Return what to say of a weight that is not finite."""
    return (
        f"the weight `{name}`: go on from a checkpoint before it, with a lower learning rate or "
        f"clipped gradients."
    )


def first_broken_weight(module: nn.Module) -> str | None:
    """Return the name of a weight that no training mends, as it is NaN or infinite, or None.

    Weights that are not trained may be infinite, as in a mask. Running statistics count as weights.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    others: dict[str, Tensor] = {
        name: p for name, p in module.named_parameters() if not p.requires_grad
    }
    for prefix, part in module.named_modules():
        if isinstance(part, _NormBase):
            others |= {f"{prefix}.{name}": x for name, x in part.named_buffers(recurse=False)}
    kept = {name: x for name, x in (trained | others).items() if x.is_floating_point()}
    if not kept or bool(norms_are_finite(list(kept.values())).all()):
        return None
    for name, x in kept.items():
        is_broken = ~local(x).isfinite() if name in trained else local(x).isnan()
        if bool(is_broken.any()):
            return name
    return None


def first_of_ranks(found: Any) -> Any:
    """Return the smallest of what ranks have found, or None; all ranks call it."""
    return min((each for each in gather_objects(found) if each is not None), default=None)


def norms_are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return for each tensor whether its norm is finite ``(n,)``, without waiting for the device.

    Sums of 16 bits are taken in float32. Of sharded tensors it is said of this rank's rows.
    """
    is_wide = any(x.dtype == torch.float64 for x in tensors)
    rows = [local(x) for x in tensors]
    # an empty one has no norm
    rows = [own if own.numel() else own.new_zeros(1) for own in rows]
    norms = torch._foreach_norm(rows, 2, dtype=None if is_wide else torch.float32)
    return torch.stack(list(norms)).isfinite()


def _is_finite(noised: Noised) -> Tensor:
    """Return which draws' samples and conditions are finite ``(n,)``."""
    parts: list[Any] = [noised.x0, *leaves(noised.cond or {})]
    found = torch.ones_like(noised.t, dtype=torch.bool)
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            found = found & part.reshape(len(part), -1).isfinite().all(dim=1)
    return found


def _place(batch: BatchRecord, row: int) -> str:
    sample = (
        f"draw {row} of the batch" if batch.index is None else f"sample {int(batch.index[row])}"
    )
    where = f" on rank {rank()}" if world_size() > 1 else ""
    return (
        f"{sample}, noise level {float(batch.noise_level[row]):.3g}, "
        f"batch {batch.number} of the step{where},"
    )
