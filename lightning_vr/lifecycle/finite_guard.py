"""What to do where a sample, a loss or a gradient is not finite: stop and say where, or skip.

One number that is not finite makes the whole gradient so, under DDP on every rank: a look at its
norm once in an optimizer step tells all ranks alike, and only then are the batches searched.
float16 is the exception: its gradients overflow as a matter of course, which the loss scaler
mends, so there the losses tell, summed over the ranks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_vr.core.distributed import (
    SharedError,
    all_reduce_sum,
    gather_objects,
    rank,
    world_size,
)
from lightning_vr.core.types import LossEstimate, Noised
from lightning_vr.lifecycle.precision import loss_scaler

if TYPE_CHECKING:
    from lightning_vr.training.module import DiffusionModule

OnNonFinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class _Batch:
    """What is kept of a micro-step until its optimizer step, by draw."""

    number: int
    sample_is_finite: Tensor
    loss_is_finite: Tensor
    noise_level: Tensor
    index: Tensor | None


_ADVICE = {
    "sample_is_finite": "is not finite: remove it from the data or mend `encode`.",
    "loss_is_finite": "has a loss that is not: lower the learning rate, clip gradients, or train "
    "with more precision.",
}


class FiniteGuard:
    """Watches the optimizer steps of a module.

    Args:
        action: ``"raise"``: stop. ``"skip"``: leave the step out on all ranks, and count it.

    Attributes:
        skipped: Number of steps left out.
    """

    def __init__(self, action: OnNonFinite) -> None:
        if action not in ("raise", "skip"):
            raise ValueError(
                f"Argument `on_nonfinite` expected to be 'raise' or 'skip', but got {action!r}."
            )
        self.action = action
        self.skipped = 0
        self._window: list[_Batch] = []

    def add(self, estimate: LossEstimate, micro_step: int) -> None:
        """Note a micro-step, without waiting for the device."""
        if micro_step == 0:
            self._window = []
        noised = estimate.noised
        control = 0.0 if estimate.control is None else estimate.control
        is_finite = (estimate.per_draw + control).isfinite()
        parts = _is_finite(noised), is_finite, noised.noise_level, noised.index
        self._window.append(_Batch(micro_step, *parts))

    def check(self, module: "DiffusionModule") -> bool:
        """Return whether the step may be made; all ranks call it, before the optimizer's step.

        Raises:
            SharedError: If it may not and steps are not to be skipped.
        """
        if self._is_sound(module):
            return True
        message = self._message(module)
        if self.action == "raise":
            raise SharedError(
                f"{message} What was trained until then is in the last checkpoint, if there is "
                f"one; `on_nonfinite='skip'` leaves such steps out."
            )
        if self.skipped == 0:
            rank_zero_warn(f"{message} The step is left out, as will be others like it.")
        self.skipped += 1
        return False

    def _is_sound(self, module: "DiffusionModule") -> bool:
        if loss_scaler(module.trainer) is None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(1)]
            return bool(torch.stack(norms).isfinite().all())
        bad = torch.stack([(~batch.loss_is_finite).sum() for batch in self._window]).sum()
        return int(all_reduce_sum(bad)) == 0

    def _message(self, module: "DiffusionModule") -> str:
        """Return what all ranks say: the worst that any of them has found."""
        found = [each for each in gather_objects(self._culprit()) if each is not None]
        what = min(found)[1] if found else _parameter(module)
        return f"Optimizer step {module.global_step} met a number that is not finite: {what}"

    def _culprit(self) -> tuple[int, str] | None:
        """Return the first sample, or else the first loss, that is not finite, with its rank."""
        # a sample among the references spoils the losses of others
        for severity, (kind, advice) in enumerate(_ADVICE.items()):
            for batch in self._window:
                is_finite = getattr(batch, kind)
                if not bool(is_finite.all()):
                    row = int((~is_finite).nonzero()[0])
                    return severity, f"{_place(batch, row)} {advice}"
        return None


def _is_finite(noised: Noised) -> Tensor:
    """Tell which draws' samples and conditions are finite ``(n,)``."""
    parts: list[Any] = [noised.x0, *(noised.cond or {}).values()]
    found = torch.ones_like(noised.t, dtype=torch.bool)
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            found = found & part.reshape(len(part), -1).isfinite().all(dim=1)
    return found


def _place(batch: _Batch, row: int) -> str:
    sample = (
        f"draw {row} of the batch" if batch.index is None else f"sample {int(batch.index[row])}"
    )
    where = f" on rank {rank()}" if world_size() > 1 else ""
    return (
        f"{sample}, noise level {float(batch.noise_level[row]):.3g}, "
        f"batch {batch.number} of the step{where},"
    )


def _parameter(module: "DiffusionModule") -> str:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return (
                f"the gradient of `{name}`, though every loss is finite: clip gradients, lower the "
                f"learning rate, or train with more precision."
            )
    return "the norm of the gradient overflows: lower the learning rate."
