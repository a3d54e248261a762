"""What pilots and checks need to know of a run, without its trainer."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_vr.lifecycle.loggers import log_numbers
from lightning_vr.lifecycle.precision import loss_scale


@dataclass(frozen=True)
class RunContext:
    """Facts of a run, each read when it is asked for.

    They are plain functions, which deep copies share: a copy of a module does not copy the trainer.

    Attributes:
        step: Optimizer steps so far.
        planned_steps: Optimizer steps of the whole run; may be infinite.
        accumulation: Batches of an optimizer step on one rank.
        precision: Makes the context that the trainer runs forward passes in.
        loss_scale: Factor on losses; 1 but in float16.
        log: Sends numbers by name to all loggers.
    """

    step: Callable[[], int]
    planned_steps: Callable[[], float]
    accumulation: Callable[[], int]
    precision: Callable[[], AbstractContextManager[Any]]
    loss_scale: Callable[[], float]
    log: Callable[[Mapping[str, float]], None]

    @classmethod
    def of(cls, trainer: Trainer) -> "RunContext":
        """Return the context of a trainer's run."""
        return cls(
            step=lambda: trainer.global_step,
            planned_steps=lambda: trainer.estimated_stepping_batches,
            accumulation=lambda: int(trainer.accumulate_grad_batches),
            precision=lambda: trainer.precision_plugin.forward_context(),
            loss_scale=lambda: loss_scale(trainer),
            log=lambda numbers: log_numbers(trainer, numbers),
        )
