"""What a checkpoint must hold beyond what Lightning keeps, so that a resumed run is exact.

Lightning restores weights, optimizers and counters, but neither the position within an epoch
(``epoch_position.py``) nor the gradients of an incomplete accumulation window nor what each rank
has observed since the ranks last shared it. The last two are saved as means over the ranks, which a
step computes anyway: on one process the resumed run is bitwise the uninterrupted one, on several up
to the order of summation.

Private attributes of Lightning's loops are as seen in version 2.6.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_vr.core.distributed import all_reduce_mean, ranks_save_together
from lightning_vr.core.sharding import is_sharded, placed_like
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.lifecycle.checkpoint_errors import damaged
from lightning_vr.lifecycle.csv_logs import begin_csv_logs, count_csv_rows
from lightning_vr.lifecycle.epoch_position import BatchMarks, EpochPosition
from lightning_vr.lifecycle.epoch_sums import EpochSums
from lightning_vr.lifecycle.learned_state import LearnedState
from lightning_vr.lifecycle.own_state import STATE
from lightning_vr.lifecycle.restarting import forget_restart, log_row, restart
from lightning_vr.lifecycle.saved_parameters import once, saved_parameters
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of
from lightning_vr.lifecycle.weight_averaging import update_weights

_SAVED = ("position", "window", "row", "metrics", "sums", "csv_rows")


class Resuming:
    """What a module keeps in the checkpoints of a fit, and what it makes up for on a resume.

    Attributes:
        marks: What is known of the training batch that runs.
    """

    def __init__(self) -> None:
        self.marks = BatchMarks()
        self._learned = LearnedState()
        self._sums = EpochSums()
        self._loaded: dict[str, Any] = {}
        self._has_just_loaded = False
        self._at_error: tuple[EpochPosition, dict[str, Any] | None] | None = None
        self._data = EpochPosition()  # with the data of the fit
        self._handles: list[Any] = []
        self._empty_epochs = 0

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint was loaded from which the run has not gone on yet."""
        return bool(self._loaded)

    def load(self, trainer: Trainer, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Take what ``state`` returned for the checkpoint, and set the checkpoint's counters."""
        self._loaded, self._has_just_loaded = {}, True
        if "position" in state:
            self._loaded = {name: state.get(name) for name in _SAVED}
            self._position.put_into(checkpoint, trainer)

    def begin(self, trainer: Trainer) -> None:
        """Forget an earlier fit; call it when a fit begins, after its checkpoint is loaded."""
        self.marks, self._at_error, self._empty_epochs = BatchMarks(), None, 0
        if not self._has_just_loaded:
            self._loaded = {}
        self._sums.load(self._loaded.get("sums", {}))
        begin_csv_logs(trainer, self._loaded.get("csv_rows") or {})
        self._has_just_loaded = False
        forget_restart(trainer)
        self._note_position_of_errors(trainer)

    def begin_batch(self, module: LightningModule) -> None:
        """Begin a training batch."""
        self.marks = BatchMarks.of(module.trainer)
        self._empty_epochs = -1
        self._learned.keep(module)
        self._sums.begin_batch(module.trainer)

    def end_batch(self, trainer: Trainer) -> None:
        """Note that the callbacks have seen the end of the batch."""
        self.marks.has_ended = True
        self._sums.end_batch(trainer)

    def end_epoch(self, module: LightningModule) -> None:
        """End an epoch, and raise if training makes no progress.

        Raises:
            MisconfigurationException: If two epochs in a row had no batch.
        """
        self._sums.end_epoch(module)
        self._empty_epochs += 1
        if self._empty_epochs == 2:
            raise MisconfigurationException(
                "`train_dataloaders` must give batches in each epoch, got none in two epochs in a "
                "row: make a loader that can be iterated over again, or end the run."
            )

    def begin_training(self, trainer: Trainer) -> None:
        """Note what is trained on and, before Lightning counts it, when weights have changed."""

        def note(*_: Any) -> None:
            self.marks.has_stepped, self.marks.is_stepping = True, False

        for handle in self._handles:
            handle.remove()
        self._handles = [each.register_step_post_hook(note) for each in trainer.optimizers]
        self._data.set_data(trainer)

    def state(self, module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint must hold besides Lightning's own; all ranks call it.

        Args:
            module: A module that is fitting or has fitted.
            checkpoint: The checkpoint. What each rank has observed is replaced by the mean over
                ranks.
        """
        trainer = module.trainer
        # rows that the checkpoint counts as logged must outlast the process
        for logger in trainer.loggers:
            logger.save()
        if self._loaded:
            return self._loaded  # the run has not gone on since
        position, row = self._at_error or self._read(trainer)
        return {
            "position": position.state(),
            "window": self._window(module, checkpoint, position),
            "row": row,
            "metrics": _on_cpu(trainer._logger_connector._callback_metrics),
            "sums": self._sums_within_epoch(trainer, position),
            "csv_rows": count_csv_rows(trainer),
        }

    def restore_gradients(self, module: LightningModule) -> None:
        """Give the parameters the gradients of an accumulation window that was not complete.

        Raises:
            MisconfigurationException: If windows have another size now.
        """
        if not self._loaded:
            return
        if self._position.has_begun:
            for callback in callbacks_of(module.trainer):
                if isinstance(callback, GradientAccumulationScheduler):
                    callback.on_train_epoch_start(module.trainer)
        window, batches = self._loaded["window"], module.trainer.accumulate_grad_batches
        if window is None:
            return
        if window["batches"] != batches:
            raise MisconfigurationException(
                f"`accumulate_grad_batches` must be {window['batches']}, as the checkpoint is from "
                f"the middle of an optimizer step of so many batches, got {batches}: resume with "
                f"{window['batches']}, or from another checkpoint."
            )
        if window["lost"]:
            rank_zero_warn(
                f"The checkpoint was saved within a backward pass: the gradients of "
                f"{window['lost']} batches are lost, and the next optimizer step uses only the "
                f"rest of its {batches} batches."
            )
        parameters = saved_parameters(module)
        for name, gradient in window["gradients"].items():
            if name not in parameters or parameters[name].shape != gradient.shape:
                allowed = "the gradient of a parameter of the module"
                path = module.trainer.ckpt_path
                raise damaged(f"{STATE}.window.gradients.{name}", allowed, gradient, path)
            placed = placed_like(gradient, parameters[name])
            parameters[name].grad = placed.to(parameters[name].device, copy=True)

    def restart(self, trainer: Trainer) -> None:
        """Go on from the position of the checkpoint; all ranks call it last at train start."""
        if not self._loaded:
            return
        position, loaded = self._position, self._loaded
        self._restore_metrics(trainer)

        def begin() -> None:
            self._loaded = {}
            if position.due != "nothing":
                self.marks = BatchMarks.of(trainer)
                self.marks.has_ended = True

        restart(trainer, position, loaded["row"], begin)

    def end(self, trainer: Trainer) -> None:
        """Log the final step's pending metrics, where Lightning finds that no step is left."""
        self._restore_metrics(trainer)
        position, row, self._loaded = self._position, self._loaded["row"], {}
        self._data = position
        log_row(trainer, row)
        for logger in trainer.loggers:
            logger.save()
        if position.due != "nothing" and _is_validation_due(trainer, position):
            rank_zero_warn(
                "The checkpoint is from the run's last step, so training is over, and the "
                "validation run that was due after it is not made: run `validate` for it."
            )

    def _sums_within_epoch(self, trainer: Trainer, position: EpochPosition) -> dict[str, Any]:
        if not position.has_begun or position.due == "epoch_end":
            return {}
        again = self._is_taken_again(trainer, position)
        return self._sums.state(trainer, is_taken_again=again, is_cut=position.is_cut)

    def _is_taken_again(self, trainer: Trainer, position: EpochPosition) -> bool:
        """Return whether the last batch must be trained on again."""
        return self.marks.are_of(trainer) and position.total_batches < self.marks.number

    @property
    def _position(self) -> EpochPosition:
        return EpochPosition(**self._loaded["position"])

    def _restore_metrics(self, trainer: Trainer) -> None:
        """Restore the numbers that callbacks and schedulers monitor."""
        device, row = trainer.strategy.root_device, self._loaded["row"]
        metrics = self._loaded["metrics"] | ({} if row is None else row["metrics"])
        metrics = {name: value.to(device) for name, value in metrics.items()}
        trainer._logger_connector._callback_metrics.update(metrics)

    def _read(self, trainer: Trainer) -> tuple[EpochPosition, dict[str, Any] | None]:
        position = EpochPosition.of(trainer, self.marks)
        # after a fit the trainer may have other data, or none
        position.data, position.sizes = self._data.data, self._data.sizes
        return position, _row(trainer, position)

    def _note_position_of_errors(self, trainer: Trainer) -> None:
        """Read the position where an error is handled: later the stages and the stack are gone."""
        strategy: Any = trainer.strategy
        handle = type(strategy).on_exception

        def on_exception(exception: BaseException) -> None:
            self._at_error = self._read(trainer)
            handle(strategy, exception)

        strategy.on_exception = on_exception

    @torch.no_grad()
    def _window(
        self, module: LightningModule, checkpoint: dict[str, Any], position: EpochPosition
    ) -> dict[str, Any] | None:
        """Return the gradients of an incomplete optimizer step, None between two steps."""
        trainer = module.trainer
        batches = trainer.accumulate_grad_batches
        is_taken_again = self._is_taken_again(trainer, position)
        if is_taken_again:
            update_weights(checkpoint, self._learned.kept)
        waiting = position.batches % batches if position.is_within_epoch else 0
        if waiting == 0:
            return None
        device = trainer.strategy.root_device  # after a fit the module is on the CPU

        def mean(x: Tensor) -> Tensor:
            return all_reduce_mean(x.to(device)) if ranks_save_together() else x

        for name, part in module.named_modules():
            if isinstance(part, LearnedProposal):
                key, state = f"{name}._extra_state", part.get_extra_state()
                state = self._learned.kept[key] if is_taken_again else state
                update_weights(checkpoint, {key: state | {"observed": mean(state["observed"])}})
        window = {"batches": batches, "gradients": {}, "lost": 0}
        is_begun = is_taken_again and self.marks.has_backward_begun
        if is_begun or trainer.state.fn != TrainerFn.FITTING:
            return window | {"lost": waiting}
        gradients = {
            # what is sharded has been reduced over the ranks
            name: parameter.grad if is_sharded(module) else mean(parameter.grad).cpu()
            for name, parameter in once(saved_parameters(module)).items()
            if parameter.grad is not None
        }
        return window | {"gradients": gradients}


def _row(trainer: Trainer, position: EpochPosition) -> dict[str, Any] | None:
    """Return the numbers that Lightning has not logged yet, or None."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    if not trainer.training or trainer._results is None:
        return None
    if position.due == "epoch_end":
        if not ranks_save_together():
            return None  # to sum over the ranks takes all of them
        step = loop._batches_that_stepped - 1
    elif position.due in ("batch_end", "validation"):
        if loop._should_accumulate() or not connector.should_update_logs:
            return None
        step = loop._batches_that_stepped
    else:
        return None
    found = connector.metrics
    numbers = {name: float(value) for name, value in found["log"].items()}
    numbers["epoch"] = trainer.current_epoch
    return {"step": step, "numbers": numbers, "metrics": _on_cpu(found["callback"])}


def _on_cpu(metrics: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value).detach().cpu() for name, value in metrics.items()}


def _is_validation_due(trainer: Trainer, position: EpochPosition) -> bool:
    """Return whether a validation run follows the last batch, or was being made."""
    if position.due == "validation":
        return True
    loop = trainer.fit_loop.epoch_loop
    return position.due == "batch_end" and loop._should_check_val_fx(None)  # type: ignore[arg-type]
