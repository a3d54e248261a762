"""What pilots and checks need to know of a run, without its trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_vr.lifecycle.curve_log import CurveLog, Row, log_rows, open_curve_log
from lightning_vr.lifecycle.loggers import log_numbers, log_table
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
        log: Sends numbers by name to all loggers, and points of curves to what callbacks monitor.
        open_curve_log: Opens a file of curves, if the run has a logger; all ranks call it.
        log_rows: Adds rows of the present step to such a file.
        log_table: Shows a table in loggers that can, by name, columns and rows.
    """

    step: Callable[[], int]
    planned_steps: Callable[[], float]
    accumulation: Callable[[], int]
    precision: Callable[[], AbstractContextManager[Any]]
    loss_scale: Callable[[], float]
    log: Callable[[Mapping[str, float], Mapping[str, float]], None]
    open_curve_log: Callable[[str, Sequence[str], int], CurveLog]
    log_rows: Callable[[CurveLog, Iterable[Row]], None]
    log_table: Callable[[str, Sequence[str], Iterable[Row]], None]

    @classmethod
    def of(cls, trainer: Trainer) -> "RunContext":
        """Return the context of a trainer's run."""
        return cls(
            step=lambda: trainer.global_step,
            planned_steps=lambda: trainer.estimated_stepping_batches,
            accumulation=lambda: int(trainer.accumulate_grad_batches),
            precision=lambda: trainer.precision_plugin.forward_context(),
            loss_scale=lambda: loss_scale(trainer),
            log=lambda numbers, curves: log_numbers(trainer, numbers, curves),
            open_curve_log=lambda *given: open_curve_log(trainer, *given),
            log_rows=lambda log, rows: log_rows(trainer, log, rows),
            log_table=lambda *given: log_table(trainer, *given) if trainer.is_global_zero else None,
        )
