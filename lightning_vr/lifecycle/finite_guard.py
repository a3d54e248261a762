"""What to do where a sample, a loss or a gradient is not finite: stop and say where, or skip.

Once in an optimizer step the losses and the norms of the gradients are looked at, all as one number
that is summed over the ranks. A loss counts also where its gradient is finite, as that of a
saturated function is. Only if the number says so are weights and batches searched. float16 is an
exception: its gradients overflow as a matter of course, which the loss scaler corrects, so there
the losses alone are looked at.

To look at a number is to wait until the device has computed it, and then the device waits for the
next work. Fused Adam and AdamW take the number on the device (``found_inf``) and leave a bad step
out themselves, its count included. With them the host looks one step late, when the number has long
arrived: weights never take a bad step, and the error names it, but comes in the next one.

What skipping cannot mend ends the run: a weight that is not finite, and steps that fail again and
again.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lightning_vr.core.devices import PendingNumber
from lightning_vr.core.distributed import SynchronizedError, all_reduce_sum, world_size
from lightning_vr.core.sharding import is_sharded
from lightning_vr.core.types import DrawEstimate
from lightning_vr.core.validation import check_choice
from lightning_vr.lifecycle.nonfinite_cause import (
    BatchRecord,
    StepRecord,
    first_broken_weight,
    first_of_ranks,
    name_weight,
    norms_are_finite,
)
from lightning_vr.lifecycle.precision import loss_scaler, unscales_itself

OnNonFinite = Literal["raise", "skip"]

MOST_SKIPPED = 20
"""Optimizer steps in a row that may be left out: more are no accident of single samples."""

_MOST_OVERFLOWS = 40
"""Steps in a row whose gradients may overflow float16: each halves the loss scale."""


class _WaitingStep(NamedTuple):
    """A step that the optimizer has made or left out, before the host knows which."""

    record: StepRecord
    wrong: PendingNumber


class FiniteGuard:
    """Watches the optimizer steps of a module.

    Args:
        action: ``"raise"``: stop. ``"skip"``: leave the step out on all ranks, and count it.

    Attributes:
        skipped: Number of steps left out, as far as the host has looked.
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
        self._batches: list[BatchRecord] = []
        self._waiting: _WaitingStep | None = None
        self._is_late: bool | None = None  # whether it looks one step late in this fit

    def begin(self) -> None:
        """Begin a fit: no step is left out yet."""
        self._in_a_row, self._scale, self._overflows = 0, None, torch.zeros(())
        self._has_stepped, self._waiting, self._is_late = False, None, None
        self.begin_step()

    def begin_step(self) -> None:
        """Begin a record of the step's batches."""
        self._losses, self._batches = [], []

    def add_loss(self, loss: Tensor) -> None:
        """Note whether the loss of a batch is finite, without waiting for the device."""
        self._losses.append(loss.detach().isfinite().all())

    def add_draws(self, estimate: DrawEstimate, micro_step: int) -> None:
        """Note which draws of a batch are finite, to name the first that is not."""
        self._batches.append(BatchRecord.of(estimate, micro_step))

    def guard(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> bool:
        """Have a bad step left out; all ranks call it, before the optimizer's step.

        Returns:
            False if this step, or one before that is looked at late, is left out.

        Raises:
            SynchronizedError: As ``check`` does.
        """
        if self._is_late is None or not module.automatic_optimization:
            self._is_late = _leaves_out_itself(trainer, module, optimizer)
        if not self._is_late:
            is_made = self.check(trainer, module)
            if not is_made:
                skip_step(trainer, module, optimizer)
            return is_made
        vars(optimizer).pop("found_inf", None)
        record, wrong = self._look(trainer, module)
        earlier, self._waiting = self._waiting, None
        is_made = earlier is None or self._judge(*_arrived(earlier), module)
        if wrong is not None:
            self._waiting = _WaitingStep(record, PendingNumber(wrong))
            vars(optimizer)["found_inf"] = (wrong > 0).float()
        return is_made

    def check(self, trainer: Trainer, module: LightningModule) -> bool:
        """Return whether the step may be made; all ranks call it, before the optimizer's step.

        Raises:
            SynchronizedError: If it may not and steps are not to be skipped, or if to skip them
                does not help.
        """
        record, wrong = self._look(trainer, module)
        is_bad = wrong is not None and int(wrong) > 0
        if is_bad and bool(self._overflows > _MOST_OVERFLOWS):
            raise SynchronizedError(
                f"Optimizer step {trainer.global_step} met gradients that overflow float16, as "
                f"they did in the {_MOST_OVERFLOWS} steps before at ever smaller loss scales: "
                f"lower the learning rate, or train with bf16-mixed."
            )
        return self._judge(record, is_bad, module)

    def check_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the last step, and raise if it has left a weight that is not finite.

        Raises:
            SynchronizedError: With its name, or as ``check`` does.
        """
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)
        earlier, self._waiting = self._waiting, None
        if earlier is not None:
            self._judge(*_arrived(earlier), module)
        weight = first_of_ranks(first_broken_weight(module)) if self._has_stepped else None
        if weight is not None:
            raise SynchronizedError(
                f"The last optimizer step left a number that is not finite: {name_weight(weight)}"
            )

    def count(self) -> int:
        """Return how many steps are left out, with one that waits to be looked at."""
        return self.skipped + (self._waiting is not None and _arrived(self._waiting)[1])

    def _judge(self, record: StepRecord, is_bad: bool, module: LightningModule) -> bool:
        """Return whether a step was good, or raise if it was not and cannot be left out."""
        if not is_bad:
            self._in_a_row, self._has_stepped = 0, True
            return True
        weight, what = record.cause(module)
        message = f"Optimizer step {record.number} met a number that is not finite: {what}"
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

    def _look(self, trainer: Trainer, module: LightningModule) -> tuple[StepRecord, Tensor | None]:
        """Return what is known of a step, and how much in it is not finite, on the device."""
        wrong, scaler = [~is_finite for is_finite in self._losses], loss_scaler(trainer)
        named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
        names, norms = [name for name, _ in named], None
        if named:
            norms = norms_are_finite([gradient for _, gradient in named])
        if scaler is not None:
            self._count_overflows(scaler._get_scale_async())
            wrong.append(self._overflows > _MOST_OVERFLOWS)
        elif norms is not None:
            wrong.append(~norms.all())
        record = StepRecord(trainer.global_step, self._batches, names, norms)
        if not wrong and world_size() == 1:
            return record, None
        total = torch.stack(wrong).sum() if wrong else torch.zeros((), device=module.device)
        return record, all_reduce_sum(total)

    def _count_overflows(self, scale: Tensor) -> None:
        """Count how often in a row a loss scale has fallen, on its device."""
        if self._scale is None:
            self._scale, self._overflows = scale, torch.zeros_like(scale)
        self._overflows = torch.where(scale < self._scale, self._overflows + 1, 0)
        self._scale = scale.clone()


def skip_step(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
    """Let the optimizer pass over all parameters."""
    # what scales losses for a fused optimizer looks for infinities only when it steps
    scaled = loss_scaler(trainer) is not None and unscales_itself(optimizer)
    for parameter in module.parameters():
        if not scaled:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad.fill_(math.inf)


def _leaves_out_itself(trainer: Trainer, module: LightningModule, optimizer: Any) -> bool:
    """Return whether an optimizer leaves a step out by a number on the device.

    Other fused ones take it too, but SGD begins with a momentum that is then never set. Sharded
    weights do not take one that is not sharded.
    """
    return (
        isinstance(optimizer, Adam | AdamW)
        and unscales_itself(optimizer)
        and loss_scaler(trainer) is None
        and module.automatic_optimization
        and not is_sharded(module)
    )


def _arrived(step: _WaitingStep) -> tuple[StepRecord, bool]:
    """Return what is known of a step, and whether it was left out."""
    return step.record, step.wrong.value() > 0
