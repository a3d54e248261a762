"""What a checkpoint must hold beyond what Lightning keeps, so that a resumed run is exact.

Lightning restores weights, optimizers and counters, but neither the gradients of an incomplete
accumulation window nor what each rank has observed since the ranks last shared it. Both are saved
as means over the ranks, which a step computes anyway: on one process the resumed run is bitwise the
uninterrupted one, on several up to the order of summation. Nor does Lightning make up for what came
after the moment of the checkpoint: logs, a validation run, the end of an epoch.

Private attributes of Lightning's loops are as seen in version 2.6.
"""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_vr.core.distributed import all_reduce_mean, ranks_save_together
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.lifecycle.weight_averaging import update_weights

_SAVED = ("window", "row", "unvalidated")


class Resuming:
    """What a module keeps in the checkpoints of a fit, and what it makes up for on a resume.

    Attributes:
        has_validated: Whether the validation run that follows a training batch has ended.
        has_backward_begun: Whether gradients hold part of a batch that is being trained on.
    """

    def __init__(self) -> None:
        self.has_validated = False
        self.has_backward_begun = False
        self._loaded: dict[str, Any] = {}
        self._has_just_loaded = False

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint was loaded whose pending work has not been done yet."""
        return bool(self._loaded)

    def load(self, state: dict[str, Any]) -> None:
        """Take what ``state`` returned for the checkpoint."""
        self._loaded = {name: state.get(name) for name in _SAVED}
        self._has_just_loaded = True

    def begin(self, trainer: Trainer) -> None:
        """Forget an earlier fit; call it when a fit begins, after its checkpoint is loaded."""
        self.has_validated = self.has_backward_begun = False
        if not self._has_just_loaded:
            self._loaded = {}
        self._has_just_loaded = False

    def begin_batch(self, trainer: Trainer) -> None:
        """Begin a training batch: nothing of it is validated or in the gradients."""
        self.has_validated = self.has_backward_begun = False
        # loggers count as the optimizer does, which an error within a batch may have undone
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def state(self, module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint must hold besides Lightning's own; all ranks call it.

        Args:
            module: A module that is fitting.
            checkpoint: The checkpoint. What each rank has observed is replaced by the mean over
                ranks.
        """
        # rows that the checkpoint counts as logged must outlast the process
        for logger in module.trainer.loggers:
            logger.save()
        if self._loaded:
            return self._loaded  # training has not begun since
        return {
            "window": self._window(module, checkpoint),
            "row": _waiting_row(module.trainer),
            "unvalidated": module.trainer.validating and not self.has_validated,
        }

    @torch.no_grad()
    def _window(self, module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Return the gradients of an incomplete optimizer step, None between two steps."""
        waiting, trainer = _waiting_batches(module.trainer), module.trainer
        if waiting == 0:
            return None
        device = trainer.strategy.root_device  # after a fit the module is on the CPU

        def mean(x: Tensor) -> Tensor:
            return all_reduce_mean(x.to(device)) if ranks_save_together() else x

        for name, part in module.named_modules():
            if isinstance(part, LearnedProposal):
                state = part.state_over_ranks(mean)
                update_weights(checkpoint, {f"{name}._extra_state": state})
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        window = {"batches": trainer.accumulate_grad_batches, "gradients": {}, "lost": 0}
        if progress.started > progress.processed and self.has_backward_begun:
            return window | {"lost": waiting}
        gradients = {
            name: mean(parameter.grad).cpu()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        return window | {"gradients": gradients}

    def restore_gradients(self, module: LightningModule) -> None:
        """Give the parameters the gradients of an accumulation window that was not complete.

        Raises:
            MisconfigurationException: If windows have another size now.
        """
        window = self._loaded.get("window")
        if window is None:
            return
        batches = module.trainer.accumulate_grad_batches
        if window["batches"] != batches:
            raise MisconfigurationException(
                f"`accumulate_grad_batches` must be {window['batches']}, as the checkpoint is from "
                f"the middle of an optimizer step of so many batches, got {batches}: resume with "
                f"{window['batches']}, or from another checkpoint."
            )
        if window["lost"]:
            rank_zero_warn(
                f"The checkpoint was saved by an error within a backward pass: the gradients of "
                f"{window['lost']} batches are lost, and the next optimizer step uses only the "
                f"rest of its {batches} batches."
            )
        parameters = dict(module.named_parameters())
        for name, gradient in window["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device, copy=True)

    def replay_skipped_hooks(self, trainer: Trainer) -> None:
        """Run the hooks that Lightning skips when it restarts; all ranks call it at train start.

        A checkpoint from the end of a training batch is saved before the batch is logged and before
        the validation run that may follow, but Lightning takes both for done. It does the same with
        a validation run that was stopped, and with the end of an epoch if steps are counted.
        """
        loaded = self._log_row(trainer)
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if not loop.restarting or fit._data_fetcher is None:
            return
        epochs: Any = fit.epoch_progress.current
        is_batch_end = loop.restarted_on_train_batch_end
        if epochs.processed == epochs.started and not is_batch_end:
            # between two epochs; if steps are counted Lightning would go on with the finished one
            if fit.restarted_on_epoch_end:
                fit.epoch_progress.increment_completed()
            fit.reset_restart_stage()
            fit._restarting = loop._restarting = False
            return
        if loop.val_loop.restarted_mid_evaluation:
            # Lightning would evaluate as many batches as are left, but from the first one on
            loop.val_loop.restarting = False
        is_last = loop.batch_progress.is_last_batch
        if is_batch_end and is_last:
            _end_epoch(trainer)
        began = epochs.completed
        if is_batch_end and fit.restarted_mid_epoch and is_last:
            # Lightning has counted the next epoch, but would not count it as begun
            epochs.completed -= 1
            fit.reset_restart_stage()
        if loop._should_check_val_fx(fit._data_fetcher):
            if is_batch_end or loaded.get("unvalidated"):
                _validate(trainer)
            if loop.restarted_on_last and not loop._should_accumulate():
                # Lightning is about to count this batch; a signal to stop comes after that
                loop._batches_that_stepped = trainer.global_step - 1
        epochs.completed = began

    def end(self, trainer: Trainer) -> None:
        """Log the final step's pending metrics, where Lightning finds that no step is left."""
        loaded, loop = self._log_row(trainer), trainer.fit_loop.epoch_loop
        for logger in trainer.loggers:
            logger.save()
        is_due = loaded["row"] is not None and loop._should_check_val_fx(None)  # type: ignore[arg-type]
        if is_due or loaded["unvalidated"]:
            rank_zero_warn(
                "The checkpoint is from the run's last step, so training is over, and the "
                "validation run that was due after it is not made: run `validate` for it."
            )

    def _log_row(self, trainer: Trainer) -> dict[str, Any]:
        """Log the pending row, if there is one, and return all that was loaded."""
        loaded, self._loaded = self._loaded, {}
        row = loaded.get("row")
        if row is not None:
            trainer._logger_connector.log_metrics(row["numbers"], step=row["step"])
        return loaded


def _waiting_batches(trainer: Trainer) -> int:
    """Return how many batches of an accumulation window are done, 0 between two windows."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    # Lightning knows that a batch is the last one before it trains on it
    is_last = progress.is_last_batch and progress.current.ready == done
    is_end = is_last or done == trainer.num_training_batches
    return 0 if is_end else done % trainer.accumulate_grad_batches


def _waiting_row(trainer: Trainer) -> dict[str, Any] | None:
    """Return what Lightning will log of this batch once its last hooks have run, or None."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    connector = trainer._logger_connector
    is_in_hooks = batches.processed > batches.completed
    if not is_in_hooks or trainer.fit_loop._should_accumulate():
        return None
    if trainer._results is None or not connector.should_update_logs:
        return None
    numbers = {name: float(value) for name, value in connector.metrics["log"].items()}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    return {"step": step, "numbers": numbers | {"epoch": trainer.current_epoch}}


def _validate(trainer: Trainer) -> None:
    """Make the validation run that follows the last training batch."""
    loop = trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress
    uncounted = batches.current.processed - batches.current.completed
    # a checkpoint from the run's end was saved after the batch
    for progress in (batches.current, batches.total):
        progress.completed += uncounted
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
    for progress in (batches.current, batches.total):
        progress.completed -= uncounted


def _end_epoch(trainer: Trainer) -> None:
    """Count as many batches as an epoch has now.

    On another number of ranks Lightning would make up for the difference in the next epoch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    missing = trainer.num_training_batches - progress.ready
    if 0 < missing < float("inf"):
        for count in ("ready", "started", "processed", "completed"):
            setattr(progress, count, getattr(progress, count) + int(missing))
