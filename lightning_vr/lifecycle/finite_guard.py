"""What to do where a sample, a loss or a gradient is not finite: stop and say where, or skip.

Once in an optimizer step the losses and the norms of the gradients are looked at, all as one number
that is summed over the ranks. A loss counts also where its gradient is finite, as that of a
saturated function is. Only if the number says so are weights and batches searched. float16 is an
exception: its gradients overflow as a matter of course, which the loss scaler corrects, so there
the losses alone are looked at.

What skipping cannot mend ends the run: a weight that is not finite, and steps that fail again and
again.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_vr.core.distributed import (
    SynchronizedError,
    all_reduce_sum,
    gather_objects,
    rank,
    world_size,
)
from lightning_vr.core.rows import leaves
from lightning_vr.core.sharding import local
from lightning_vr.core.types import LossEstimate, Noised
from lightning_vr.core.validation import check_choice
from lightning_vr.lifecycle.precision import loss_scaler, unscales_itself

OnNonFinite = Literal["raise", "skip"]

MOST_SKIPPED = 20
"""Optimizer steps in a row that may be left out: more are no accident of single samples."""

_MOST_OVERFLOWS = 40
"""Steps in a row whose gradients may overflow float16: each halves the loss scale."""


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
        self._in_a_row = 0
        self._has_stepped = False
        # the loss scale of float16 in the step before, and how often in a row it has fallen
        self._scale: Tensor | None = None
        self._overflows = torch.zeros(())
        self._losses: list[Tensor] = []
        self._batches: list[_Batch] = []

    def begin(self) -> None:
        """Begin a fit: no step is left out yet."""
        self._in_a_row, self._scale, self._overflows = 0, None, torch.zeros(())
        self._has_stepped = False
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the batches of the step before."""
        self._losses, self._batches = [], []

    def add_loss(self, loss: Tensor) -> None:
        """Note whether the loss of a batch is finite, without waiting for the device."""
        self._losses.append(loss.detach().isfinite().all())

    def add_draws(self, estimate: LossEstimate, micro_step: int) -> None:
        """Note which draws of a batch are finite, to name the first that is not."""
        noised = estimate.noised
        terms = (estimate.per_draw, estimate.control, estimate.bound)
        is_finite = torch.stack([x for x in terms if x is not None]).isfinite().all(dim=0)
        parts = _is_finite(noised), is_finite, noised.noise_level, noised.index
        self._batches.append(_Batch(micro_step, *parts))

    def check(self, trainer: Trainer, module: LightningModule) -> bool:
        """Return whether the step may be made; all ranks call it, before the optimizer's step.

        Raises:
            SynchronizedError: If it may not and steps are not to be skipped, or if to skip them
                does not help.
        """
        if self._is_finite(trainer, module):
            self._in_a_row, self._has_stepped = 0, True
            return True
        if bool(self._overflows > _MOST_OVERFLOWS):
            raise SynchronizedError(
                f"Optimizer step {trainer.global_step} met gradients that overflow float16, as "
                f"they did in the {_MOST_OVERFLOWS} steps before at ever smaller loss scales: "
                f"lower the learning rate, or train with bf16-mixed."
            )
        weight = _first_of_ranks(first_broken_weight(module))
        what = _describe(weight, _first_of_ranks(self._first_culprit()), module)
        message = f"Optimizer step {trainer.global_step} met a number that is not finite: {what}"
        self._in_a_row += 1
        if self.action == "raise":
            raise SynchronizedError(
                f"{message} The last checkpoint, if there is one, holds what was trained until "
                f"then; `on_nonfinite='skip'` leaves such steps out."
            )
        if weight is not None:
            raise SynchronizedError(f"{message} To leave steps out does not mend that.")
        if self._in_a_row > MOST_SKIPPED:
            raise SynchronizedError(
                f"{message} As this is so in {self._in_a_row} steps in a row, to leave them out "
                f"does not help: go on from the last checkpoint once the cause is gone."
            )
        if self.skipped == 0:
            rank_zero_warn(f"{message} The step is left out, as will be others like it.")
        self.skipped += 1
        return False

    def check_end(self, module: LightningModule) -> None:
        """Raise if training has made steps and ended with a weight that is not finite.

        Raises:
            SynchronizedError: With its name.
        """
        weight = _first_of_ranks(first_broken_weight(module)) if self._has_stepped else None
        if weight is not None:
            raise SynchronizedError(
                f"The last optimizer step left a number that is not finite: "
                f"{_describe(weight, None, module)}"
            )

    def _is_finite(self, trainer: Trainer, module: LightningModule) -> bool:
        wrong, scaler = [~is_finite for is_finite in self._losses], loss_scaler(trainer)
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if scaler is not None:
            self._count_overflows(scaler._get_scale_async())
            wrong.append(self._overflows > _MOST_OVERFLOWS)
        elif gradients:
            wrong.append(~_all_finite(gradients))
        if not wrong and world_size() == 1:
            return True
        total = torch.stack(wrong).sum() if wrong else torch.zeros((), device=module.device)
        return int(all_reduce_sum(total)) == 0

    def _count_overflows(self, scale: Tensor) -> None:
        """Count how often in a row a loss scale has fallen, on its device."""
        if self._scale is None:
            self._scale, self._overflows = scale, torch.zeros_like(scale)
        self._overflows = torch.where(scale < self._scale, self._overflows + 1, 0)
        self._scale = scale.clone()

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
    if not kept or _all_finite(list(kept.values())):
        return None
    for name, x in kept.items():
        is_broken = ~local(x).isfinite() if name in trained else local(x).isnan()
        if bool(is_broken.any()):
            return name
    return None


def _first_of_ranks(found: Any) -> Any:
    """Return the smallest of what ranks have found, or None; all ranks call it."""
    return min((each for each in gather_objects(found) if each is not None), default=None)


def _describe(weight: str | None, culprit: tuple[int, str] | None, module: LightningModule) -> str:
    """Say what is not finite: a weight, and where it is known a sample, a loss or a gradient."""
    if weight is not None:
        # a sample can break running statistics
        is_sample = culprit is not None and culprit[0] == 0
        sample = f" Besides, {culprit[1]}" if culprit is not None and is_sample else ""
        return (
            f"the weight `{weight}`: go on from a checkpoint before it, with a lower learning rate "
            f"or clipped gradients.{sample}"
        )
    if culprit is not None:
        return culprit[1]
    gradient = _first_of_ranks(_first_gradient(module))
    if gradient is None:
        return "a loss, or the norm of the gradient, overflows: lower the learning rate."
    return (
        f"the gradient of `{gradient}`, though every loss is finite: clip gradients, lower the "
        f"learning rate, or train with more precision."
    )


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Return whether norms of tensors are finite, without waiting for the device.

    Sums of 16 bits are taken in float32. Of sharded tensors it is said of this rank's rows.
    """
    is_wide = any(x.dtype == torch.float64 for x in tensors)
    # an empty one has no norm
    rows = [own for own in map(local, tensors) if own.numel()]
    if not rows:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    norms = torch._foreach_norm(rows, 2, dtype=None if is_wide else torch.float32)
    return torch.stack(list(norms)).isfinite().all()


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


def _first_gradient(module: LightningModule) -> str | None:
    """Return the parameter whose gradient, or this rank's rows of it, is not finite, or None."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
            return name
    return None
