"""Numbers that callbacks and learning-rate schedules monitor: are they logged, and when.

What a ``DiffusionModule`` logs is known, and so is what the callbacks of this package and of
Lightning log. A module or callback that logs numbers of its own may log any.
"""

import difflib
import sys
from types import FunctionType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_vr.lifecycle.precision import clippable
from lightning_vr.lifecycle.resumable_module import ResumableModule
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of
from lightning_vr.training.training_checks import check_optimization, check_schedules

_LOGGING = {"log", "log_dict", "log_numbers", "callback_metrics", "logger", "loggers"}
"""Names in the code of a method that may log."""

_BY_CHECKPOINTS = ("epoch", "step")
"""What ``ModelCheckpoint`` can monitor without anybody logging it."""

_NEVER = sys.maxsize


def plateau_settings(schedule: Any) -> dict[str, Any]:
    """Return how Lightning steps a schedule that looks at a number, as its configuration has it.

    A number of the training steps is looked at after each step. Others are new after a validation
    run only, which Lightning cannot express for runs at intervals of steps: there
    ``MonitoredSchedules`` steps the schedule.
    """
    monitor = getattr(schedule, "monitor", None)
    if not isinstance(monitor, str):
        raise ValueError(
            f"`lr_scheduler` must say what it monitors, got a {type(schedule).__module__}."
            f"{type(schedule).__name__}, which does not: use "
            f"lightning.pytorch.cli.ReduceLROnPlateau with monitor='val/loss'."
        )
    frequency = 1 if monitor.startswith("train/") else _NEVER
    return {"monitor": monitor, "frequency": frequency}


class MonitoredSchedules(ResumableModule):
    """The part of a module that makes its optimizer and steps a schedule, of a number or of steps.

    Attributes:
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, or None.
    """

    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, if there is one, a learning-rate schedule over steps."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        schedule = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        check_optimization(optimizer, schedule)
        if schedule is None:
            return optimizer
        settings: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
        if isinstance(schedule, ReduceLROnPlateau):
            settings |= plateau_settings(schedule)
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip gradients, also for a fused optimizer in bfloat16."""
        with clippable(self.trainer, optimizer):
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def on_train_start(self) -> None:
        """Raise if a schedule ends before the run, or a monitored number is never logged."""
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        check_schedules(schedules, RunContext.of(self.trainer))
        check_monitors(self.trainer, self)
        super().on_train_start()

    def on_validation_epoch_end(self) -> None:
        """Step a schedule that monitors the validation loss, before checkpoints are written."""
        self._step_plateaus(of_validation=True)
        super().on_validation_epoch_end()

    def on_validation_end(self) -> None:
        """Step a schedule that monitors what a callback has measured after the validation run."""
        self._step_plateaus(of_validation=False)
        super().on_validation_end()

    def _step_plateaus(self, *, of_validation: bool) -> None:
        if not self._is_fitting or self.trainer.sanity_checking:
            return
        for config in self.trainer.lr_scheduler_configs:
            if config.frequency != _NEVER or config.monitor is None:
                continue
            if config.monitor.startswith("val/") == of_validation:
                value = self.trainer.callback_metrics.get(config.monitor)
                if value is not None:  # a callback may measure after every n-th run
                    self.lr_scheduler_step(config.scheduler, value)


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Raise if a callback or a schedule monitors a number that nothing logs.

    Args:
        trainer: A trainer that is about to train, after its callbacks have looked at the data.
        module: The ``DiffusionModule`` that it trains.

    Raises:
        ValueError: With the numbers that are logged.
    """
    callbacks = callbacks_of(trainer)
    monitors = _monitors(trainer, callbacks)
    if not monitors or not _is_known(module) or not all(map(_logs_only_known, callbacks)):
        return
    names = ["train/loss", "train/skipped_steps", "control_variate/"]
    names += [*getattr(module, "logged", ())]
    names += ["val/loss"] if trainer.enable_validation else []
    for callback in callbacks:
        names += getattr(callback, "logged", ())
        names += ["lr-"] if isinstance(callback, LearningRateMonitor) else []
    for owner, monitor in monitors:
        _check(owner, monitor, names, has_validation=trainer.enable_validation)


def _monitors(trainer: Trainer, callbacks: list[Callback]) -> list[tuple[str, str]]:
    """Return what is monitored, with the class that does."""
    found = [
        (type(config.scheduler).__name__, config.monitor)
        for config in trainer.lr_scheduler_configs
        if config.monitor
    ]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        is_free = isinstance(callback, ModelCheckpoint) and monitor in _BY_CHECKPOINTS
        if isinstance(monitor, str) and not is_free:
            found.append((type(callback).__name__, monitor))
    return found


def _check(owner: str, monitor: str, names: list[str], *, has_validation: bool) -> None:
    if monitor in names or any(monitor.startswith(x) for x in names if x.endswith(("/", "-"))):
        return
    listed = [name for name in names if name not in ("train/skipped_steps", "control_variate/")]
    near = difflib.get_close_matches(monitor, listed, n=1, cutoff=0.0)
    fix = f"use {near[0]!r}"
    if not has_validation and monitor.startswith("val"):
        fix += ", or a `limit_val_batches` above 0 with validation data"
    raise ValueError(
        f"`monitor` of {owner} must be a number that this run logs ({', '.join(listed)}), got "
        f"{monitor!r}: {fix}."
    )


def _is_known(module: LightningModule) -> bool:
    """Return whether a module logs nothing but what ``DiffusionModule`` does."""
    libraries = ("lightning_vr.", "lightning.", "torch.", "builtins")
    own = [kind for kind in type(module).__mro__ if not kind.__module__.startswith(libraries)]
    functions = [x for kind in own for x in vars(kind).values() if isinstance(x, FunctionType)]
    return not any(_LOGGING & {*function.__code__.co_names} for function in functions)


def _logs_only_known(callback: Callback) -> bool:
    kind = type(callback)
    is_library = kind.__module__.startswith(("lightning.", "lightning_vr."))
    return is_library and not isinstance(callback, LambdaCallback)
