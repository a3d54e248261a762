"""Where a run stands: which batch of which epoch was trained on last, and what of it is still due.

Lightning's counters say where a run stands while it runs, but not in a checkpoint: the same numbers
stand for a batch whose validation run is done and for one whose is not, and a run that ends in the
middle of an epoch counts that epoch as done. So the position is read once, when a checkpoint is
saved, and all counters of a resumed run are set from it: those of Lightning, and the place of the
data module in its order.

Private attributes of Lightning's loops are as seen in version 2.6.
"""

from collections.abc import Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage

from lightning_vr.lifecycle.running_hooks import everyone, unfinished

Due = Literal[
    "nothing", "batch_end", "validation", "validation_end", "after_validation", "epoch_end"
]


@dataclass
class BatchMarks:
    """What the module's hooks note of the training batch that runs.

    Attributes:
        number: Number of the batch in all epochs, from 1.
        steps: Optimizer steps before the batch.
        logged_steps: What loggers count as steps, before the batch.
        has_backward_begun: Whether gradients hold part of the batch.
        is_stepping: Whether the optimizer may be changing weights.
        has_stepped: Whether the optimizer has changed them.
        has_ended: Whether the callbacks have seen the end of the batch.
        has_validated: Whether the validation run after the batch has ended.
    """

    number: int = 0
    steps: int = 0
    logged_steps: int = 0
    has_backward_begun: bool = False
    is_stepping: bool = False
    has_stepped: bool = False
    has_ended: bool = False
    has_validated: bool = False

    @classmethod
    def of(cls, trainer: Trainer) -> "BatchMarks":
        """Return the marks of a batch that begins."""
        loop = trainer.fit_loop.epoch_loop
        return cls(loop.total_batch_idx + 1, trainer.global_step, loop._batches_that_stepped)

    def are_of(self, trainer: Trainer) -> bool:
        """Return whether they are of the last batch, for which the hooks may not have begun."""
        return self.number == trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def has_changed_weights(self, trainer: Trainer) -> bool:
        """Return whether an optimizer step was made in the batch, be it counted or not."""
        return self.has_stepped or trainer.global_step > self.steps


@dataclass
class EpochPosition:
    """A position in a run, as checkpoints hold it.

    Attributes:
        epoch: The epoch, counted from 0.
        has_begun: Whether ``on_train_epoch_start`` was called for it.
        batches: How many of its batches are trained on.
        is_over: Whether no batch of it is left.
        due: What comes next before another batch. ``"batch_end"``: the hooks after the last batch
            and its row of numbers. ``"validation"``: the validation run, if one follows the batch.
            ``"validation_end"``: the last hooks of that run. ``"after_validation"``: schedulers
            that wait for it. ``"epoch_end"``: the rest of the epoch's end.
        left: Whose hook of that kind has not run.
        total_batches: Batches trained on in all epochs.
        steps: Optimizer steps.
        logged_steps: What loggers count as steps.
        is_cut: Whether the run has ended in the middle of this epoch, as if it were over.
        torn: Why the weights may not be those of this position, if they may not.
        data: Class of the data module.
        sizes: Samples and samples per step of each training loader, None where it has no number.
    """

    epoch: int = 0
    has_begun: bool = False
    batches: int = 0
    is_over: bool = False
    due: Due = "nothing"
    left: list[str] = field(default_factory=list)
    total_batches: int = 0
    steps: int = 0
    logged_steps: int = 0
    is_cut: bool = False
    torn: str | None = None
    data: str | None = None
    sizes: list[list[int | None]] = field(default_factory=list)

    @property
    def is_within_epoch(self) -> bool:
        """Whether batches of the epoch are trained on and others are not."""
        return self.has_begun and self.batches > 0 and not self.is_over

    @classmethod
    def of(cls, trainer: Trainer, marks: BatchMarks) -> "EpochPosition":
        """Return where a trainer stands that is fitting or has fitted."""
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        epochs: Any = fit.epoch_progress.current
        progress: Any = loop.batch_progress
        if epochs.started > epochs.processed:
            found = _within(trainer, marks)
        elif epochs.ready > epochs.processed:
            found = cls(epochs.processed)
        elif epochs.processed > epochs.completed and loop._num_ready_batches_reached():
            left = unfinished(trainer, "on_train_epoch_end") or []
            found = cls(epochs.completed, True, progress.current.ready, True, "epoch_end", left)
        elif epochs.processed == 0 or loop._num_ready_batches_reached():
            found = cls(epochs.processed)
        else:
            found = cls(epochs.processed - 1, True, progress.current.ready, is_cut=True)
        begun = progress.current.ready if found.has_begun else 0
        found.total_batches = progress.total.ready - (begun - found.batches)
        is_uncounted = found.due == "batch_end" and trainer.global_step == marks.steps
        found.steps = trainer.global_step + int(is_uncounted and marks.has_stepped)
        found.logged_steps = loop._batches_that_stepped
        return found

    def set_data(self, trainer: Trainer) -> None:
        """Note what the trainer trains on."""
        self.data, self.sizes = _data_class(trainer), training_sizes(trainer)

    def put_into(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Set the counters in a checkpoint that is about to be restored.

        Raises:
            MisconfigurationException: If it is in the middle of an epoch of another data module.
        """
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = self.epoch_counts(), _same(self.batches)
        if self.left:
            epochs["processed"] = self.epoch  # else Lightning may find that training is over
        total = _same(self.total_batches)
        loops["epoch_progress"] = {"total": epochs, "current": dict(epochs)}
        loops["epoch_loop.batch_progress"] = {
            "total": total,
            "current": batches,
            "is_last_batch": self.is_over or not self.has_begun,
        }
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = self.logged_steps
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        if trainer.lightning_module.automatic_optimization:
            optimizer["step"]["total"]["completed"] = self.steps
        manual = loops["epoch_loop.manual_optimization.optim_step_progress"]
        for counts in (optimizer["step"], optimizer["zero_grad"], manual):
            for each in counts.values():
                each.update(dict.fromkeys(each, each["completed"]))
        self._put_data(checkpoint, trainer)

    def epoch_counts(self) -> dict[str, int]:
        """Return Lightning's counters of epochs."""
        begun, ended = self.epoch + self.has_begun, self.epoch + (self.due == "epoch_end")
        return {"ready": begun, "started": begun, "processed": ended, "completed": self.epoch}

    def state(self) -> dict[str, Any]:
        """Return the position for a checkpoint."""
        return asdict(self)

    def _put_data(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        now = _data_class(trainer)
        if self.is_within_epoch and now != self.data:
            raise MisconfigurationException(
                f"`datamodule` must be of the class {self.data}, as the checkpoint is from the "
                f"middle of an epoch of its data, got {now}: resume with the same data, or from a "
                f"checkpoint of the end of an epoch."
            )
        order = checkpoint.get(now) if now is not None else None
        if isinstance(order, dict) and "batches" in order:
            order["epoch"] = self.epoch + self.is_over
            order["batches"] = 0 if self.is_over else self.batches


def _data_class(trainer: Trainer) -> str | None:
    data = trainer.datamodule  # type: ignore[attr-defined]
    return None if data is None else type(data).__qualname__


def training_sizes(trainer: Trainer) -> list[list[int | None]]:
    """Return samples and samples per step of each training loader, None if not known."""
    combined = trainer.fit_loop._combined_loader
    found: list[list[int | None]] = []
    for loader in [] if combined is None else combined.flattened:
        data, batch = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
        total = None if batch is None else batch * trainer.world_size
        found.append([len(data) if isinstance(data, Sized) else None, total])
    return found


def _within(trainer: Trainer, marks: BatchMarks) -> EpochPosition:
    """Return the position within an epoch."""
    loop = trainer.fit_loop.epoch_loop
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = loop.batch_progress.current
    is_known = marks.are_of(trainer)
    is_training = batches.ready > batches.processed
    if is_training and not (is_known and marks.has_changed_weights(trainer)):
        is_torn = is_known and marks.is_stepping
        torn = "within an optimizer step" if is_torn else None
        return EpochPosition(epochs.processed, True, batches.processed, torn=torn)
    is_over = loop._num_ready_batches_reached()
    found = EpochPosition(epochs.processed, True, batches.ready, is_over)
    if is_training or batches.processed > batches.completed:
        _add_batch_end(found, trainer, marks.has_ended)
    elif (left := unfinished(trainer, "on_validation_end")) is not None:
        found.due, found.left = "validation_end", left
    elif is_known and _is_uncounted(trainer, marks):
        found.due = "after_validation" if marks.has_validated else "validation"
    return found


def _add_batch_end(found: EpochPosition, trainer: Trainer, has_ended: bool) -> None:
    """Add which hooks after a batch are left."""
    found.due = "batch_end"
    left = unfinished(trainer, "on_train_batch_end")
    found.left = left or []
    if left is None and not has_ended:
        found.left = everyone(trainer)
        found.torn = "after an optimizer step, before the hooks that follow it"


def _is_uncounted(trainer: Trainer, marks: BatchMarks) -> bool:
    """Return whether what follows a batch has not come to the end."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.state.stage == RunningStage.VALIDATING:
        return True
    return not loop._should_accumulate() and loop._batches_that_stepped == marks.logged_steps


def _same(number: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), number)
