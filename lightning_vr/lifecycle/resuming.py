"""What a checkpoint must hold beyond what Lightning keeps, so that a resumed run repeats.

Lightning restores weights, optimizers and counters, but not gradients that wait in an accumulation
window, nor what each rank has observed since the ranks last shared it. Both are saved as means over
the ranks, which is what a step makes of them: on one process the resumed run is bitwise the
uninterrupted one, on several up to the order of summation. Nor does it make up for what came after
the moment of the checkpoint: logs, a validation run, the end of an epoch.
"""

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_vr.core.distributed import all_reduce_mean, ranks_save_together
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.lifecycle.weight_averaging import AveragedWeights

if TYPE_CHECKING:
    from lightning_vr.training.module import DiffusionModule


_SAVED = ("window", "row", "unvalidated")


class Resuming:
    """What a module keeps in the checkpoints of a fit, and makes good when one is resumed.

    Attributes:
        has_validated: Whether the validation run that follows a training batch has ended.
        has_backward_begun: Whether gradients hold part of a batch that is being trained on.
    """

    def __init__(self) -> None:
        self.has_validated = False
        self.has_backward_begun = False
        self._averages = AveragedWeights()
        self._loaded: dict[str, Any] = {}
        self._has_just_loaded = False

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint has been loaded, and what it says not yet been done."""
        return bool(self._loaded)

    def load(self, state: dict[str, Any]) -> None:
        """Take what ``state`` returned when the checkpoint was saved."""
        self._loaded = {name: state.get(name) for name in _SAVED}
        self._has_just_loaded = True

    def begin(self, trainer: Trainer) -> None:
        """Forget what an earlier fit has left; call it when a fit begins, after its checkpoint."""
        self.has_validated = self.has_backward_begun = False
        if not self._has_just_loaded:
            self._loaded = {}
        self._has_just_loaded = False
        self._averages.watch(trainer)

    def state(self, module: "DiffusionModule", checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what is to be kept; all ranks call it.

        Args:
            module: A module that is fitting.
            checkpoint: The checkpoint; what ranks have observed apart becomes their mean, and
                averaged weights that are in place go back to theirs.
        """
        # what it takes for logged must outlast the process
        for logger in module.trainer.loggers:
            logger.save()
        if self._loaded:
            return self._loaded  # training has not begun since
        self._averages.restore_training_weights(module, checkpoint)
        return {
            "window": self._window(module, checkpoint),
            "row": _waiting_row(module.trainer),
            "unvalidated": module.trainer.validating and not self.has_validated,
        }

    @torch.no_grad()
    def _window(
        self, module: "DiffusionModule", checkpoint: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return the gradients of batches that wait for more, None between two optimizer steps."""
        waiting, trainer = _waiting_batches(module.trainer), module.trainer
        if waiting == 0:
            return None
        device = trainer.strategy.root_device  # after a fit the module is on the CPU

        def mean(x: Tensor) -> Tensor:
            return all_reduce_mean(x.to(device)) if ranks_save_together() else x

        for name, part in module.named_modules():
            if isinstance(part, LearnedProposal):
                shared = part.get_extra_state() | {"observed": mean(part.observed)}
                for weights in ("state_dict", "current_model_state"):
                    if weights in checkpoint:
                        checkpoint[weights][f"{name}._extra_state"] = shared
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

    def restore_gradients(self, module: "DiffusionModule") -> None:
        """Give the parameters the gradients that waited.

        Raises:
            MisconfigurationException: If windows are of another size now.
        """
        window = self._loaded.get("window")
        if window is None:
            return
        batches = module.trainer.accumulate_grad_batches
        if window["batches"] != batches:
            raise MisconfigurationException(
                f"Argument `accumulate_grad_batches` expected to be {window['batches']}, for the "
                f"checkpoint is from the middle of so many batches, but got {batches}: resume as "
                f"it was, or from another checkpoint."
            )
        if window["lost"]:
            rank_zero_warn(
                f"The checkpoint was saved by an error in the midst of a backward pass: gradients "
                f"of {window['lost']} batches that waited are lost, and the next optimizer step is "
                f"made of the rest of its {batches}."
            )
        parameters = dict(module.named_parameters())
        for name, gradient in window["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device, copy=True)

    def replay_skipped_hooks(self, trainer: Trainer) -> None:
        """Do what Lightning leaves out where it restarts; all ranks call it when training starts.

        A checkpoint of the end of a training batch is from before what the batch logs and before
        the validation run that may follow it, both of which Lightning takes for done; so it does
        with a validation run that was stopped, and with the end of an epoch if steps are counted.
        """
        loaded = self._log_row(trainer)
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if not loop.restarting or fit._data_fetcher is None:
            return
        epochs: Any = fit.epoch_progress.current
        is_batch_end = loop.restarted_on_train_batch_end
        if epochs.processed == epochs.started and not is_batch_end:
            # between two epochs; where steps are counted it would go on with the one that has ended
            if fit.restarted_on_epoch_end:
                fit.epoch_progress.increment_completed()
            fit.reset_restart_stage()
            fit._restarting = loop._restarting = False
            return
        if loop.val_loop.restarted_mid_evaluation:
            # Lightning would evaluate as many batches as are left, but the first ones
            loop.val_loop.restarting = False
        is_last = loop.batch_progress.is_last_batch
        if is_batch_end and is_last:
            _end_epoch(trainer)
        began = epochs.completed
        if is_batch_end and fit.restarted_mid_epoch and is_last:
            # Lightning has counted on to the next epoch, but would not count that as begun
            epochs.completed -= 1
            fit.reset_restart_stage()
        if loop._should_check_val_fx(fit._data_fetcher):
            if is_batch_end or loaded.get("unvalidated"):
                _validate(trainer)
            if loop.restarted_on_last and not loop._should_accumulate():
                # a batch that it is about to count; a signal to stop comes after it has counted it
                loop._batches_that_stepped = trainer.global_step - 1
        epochs.completed = began

    def end(self, trainer: Trainer) -> None:
        """Log what the last step was about to, where Lightning finds that no step is left."""
        loaded, loop = self._log_row(trainer), trainer.fit_loop.epoch_loop
        for logger in trainer.loggers:
            logger.save()
        is_due = loaded["row"] is not None and loop._should_check_val_fx(None)  # type: ignore[arg-type]
        if is_due or loaded["unvalidated"]:
            rank_zero_warn(
                "The checkpoint is of the run's last step, so that training is over: the "
                "validation run that was to follow is not made. Make it with `validate`."
            )

    def _log_row(self, trainer: Trainer) -> dict[str, Any]:
        """Log the row that waited, if there is one, and return all that was loaded."""
        loaded, self._loaded = self._loaded, {}
        row = loaded.get("row")
        if row is not None:
            trainer._logger_connector.log_metrics(row["numbers"], step=row["step"])
        return loaded


def _waiting_batches(trainer: Trainer) -> int:
    """Return how many batches of an accumulation window have passed, 0 between two windows."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    # the last batch is known to be that before training on it begins
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
    """Make the validation run that follows the batch that was trained on last."""
    loop = trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress
    uncounted = batches.current.processed - batches.current.completed
    # a checkpoint of the run's end is from after the batch
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

    On another number of ranks Lightning would take them up in the middle of the next epoch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    missing = trainer.num_training_batches - progress.ready
    if 0 < missing < float("inf"):
        for count in ("ready", "started", "processed", "completed"):
            setattr(progress, count, getattr(progress, count) + int(missing))
