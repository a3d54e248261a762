"""What to do where a sample, a loss or a gradient is not finite: stop and say where, or skip.

One number that is not finite makes the whole gradient so, under DDP on every rank: its norm, once
in an optimizer step, tells all ranks alike, and only then are the batches searched. float16 is the
exception: its gradients overflow as a matter of course, which the loss scaler corrects, so there
the losses are looked at, summed over the ranks.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_vr.core.distributed import (
    SynchronizedError,
    all_reduce_sum,
    gather_objects,
    rank,
    world_size,
)
from lightning_vr.core.rows import leaves
from lightning_vr.core.types import LossEstimate, Noised
from lightning_vr.core.validation import check_choice
from lightning_vr.lifecycle.precision import loss_scaler, unscales_itself

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
    "sample_is_finite": "is not finite: remove it from the data or fix `encode`.",
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
        check_choice("on_nonfinite", action, ("raise", "skip"))
        self.action = action
        self.skipped = 0
        self._losses: list[Tensor] = []
        self._batches: list[_Batch] = []

    def begin_step(self) -> None:
        """Forget the batches of the step before."""
        self._losses, self._batches = [], []

    def add_loss(self, loss: Tensor) -> None:
        """Note whether the loss of a batch is finite, without waiting for the device."""
        self._losses.append(loss.detach().isfinite().all())

    def add_draws(self, estimate: LossEstimate, micro_step: int) -> None:
        """Note which draws of a batch are finite, to name the first that is not."""
        noised = estimate.noised
        control = 0.0 if estimate.control is None else estimate.control
        is_finite = (estimate.per_draw + control).isfinite()
        parts = _is_finite(noised), is_finite, noised.noise_level, noised.index
        self._batches.append(_Batch(micro_step, *parts))

    def check(self, trainer: Trainer, module: LightningModule) -> bool:
        """Return whether the step may be made; all ranks call it, before the optimizer's step.

        Raises:
            SynchronizedError: If it may not and steps are not to be skipped.
        """
        if self._is_finite(trainer, module):
            return True
        found = [each for each in gather_objects(self._first_culprit()) if each is not None]
        what = min(found)[1] if found else _first_parameter(module)
        message = f"Optimizer step {trainer.global_step} met a number that is not finite: {what}"
        if self.action == "raise":
            raise SynchronizedError(
                f"{message} The last checkpoint, if there is one, holds what was trained until "
                f"then; `on_nonfinite='skip'` leaves such steps out."
            )
        if self.skipped == 0:
            rank_zero_warn(f"{message} The step is left out, as will be others like it.")
        self.skipped += 1
        return False

    def _is_finite(self, trainer: Trainer, module: LightningModule) -> bool:
        if loss_scaler(trainer) is None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            return _all_finite(gradients) if gradients else True
        wrong = [~is_finite for is_finite in self._losses]
        total = torch.stack(wrong).sum() if wrong else torch.zeros((), device=module.device)
        return int(all_reduce_sum(total)) == 0

    def _first_culprit(self) -> tuple[int, str] | None:
        """Return the first sample, or else the first loss, that is not finite, with its rank."""
        # a sample among the references spoils the losses of others
        for severity, (kind, advice) in enumerate(_ADVICE.items()):
            for batch in self._batches:
                is_finite = getattr(batch, kind)
                if not bool(is_finite.all()):
                    row = int((~is_finite).nonzero()[0])
                    return severity, f"{_place(batch, row)} {advice}"
        return None


def skip_step(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
    """Let the optimizer pass over all parameters."""
    # what scales losses for a fused optimizer looks for infinities only when it steps
    scaled = loss_scaler(trainer) is not None and unscales_itself(optimizer)
    for parameter in module.parameters():
        if not scaled:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad.fill_(math.inf)


def _all_finite(gradients: list[Tensor]) -> bool:
    """Return whether the norms of gradients are finite; sums of 16 bits are taken in float32."""
    is_wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    norms = torch._foreach_norm(gradients, 2, dtype=None if is_wide else torch.float32)
    return bool(torch.stack(list(norms)).isfinite().all())


def _is_finite(noised: Noised) -> Tensor:
    """Return which draws' samples and conditions are finite ``(n,)``."""
    parts: list[Any] = [noised.x0, *leaves(noised.cond or {})]
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


def _first_parameter(module: LightningModule) -> str:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return (
                f"the gradient of `{name}`, though every loss is finite: clip gradients, lower the "
                f"learning rate, or train with more precision."
            )
    return "the norm of the gradient overflows: lower the learning rate."
