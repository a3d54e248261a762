"""What a checkpoint must hold beyond what Lightning keeps, so that a resumed run repeats.

Lightning restores weights, optimizers and counters, but not gradients that wait in an accumulation
window, nor what each rank has observed since the ranks last shared it. Both are saved as means over
the ranks, which is what a step makes of them: on one process the resumed run is bitwise the
uninterrupted one, on several up to the order of summation.
"""

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.distributed import all_reduce_mean, ranks_save_together
from lightning_vr.proposals import LearnedProposal

if TYPE_CHECKING:
    from lightning_vr.module import DiffusionModule


def waiting_batches(trainer: Trainer) -> int:
    """Return how many batches of an accumulation window have passed, 0 between two windows."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    is_end = progress.is_last_batch or done == trainer.num_training_batches
    return 0 if is_end else done % trainer.accumulate_grad_batches


@torch.no_grad()
def save_window(module: "DiffusionModule", checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the window's state, None between two; all ranks call it.

    Args:
        module: A module that is training.
        checkpoint: The checkpoint; what ranks have observed apart becomes their mean.
    """
    if waiting_batches(module.trainer) == 0:
        return None
    mean = all_reduce_mean if ranks_save_together() else _own
    for name, part in module.named_modules():
        if isinstance(part, LearnedProposal):
            shared = part.get_extra_state() | {"observed": mean(part.observed)}
            for weights in ("state_dict", "current_model_state"):
                if weights in checkpoint:
                    checkpoint[weights][f"{name}._extra_state"] = shared
    gradients = {
        name: mean(parameter.grad).cpu()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    batches = module.trainer.accumulate_grad_batches
    return {"batches": batches, "gradients": gradients}


def restore_window(module: "DiffusionModule", window: dict[str, Any] | None) -> None:
    """Give the parameters the gradients that waited.

    Raises:
        MisconfigurationException: If windows are of another size now.
    """
    if window is None:
        return
    batches = module.trainer.accumulate_grad_batches
    if window["batches"] != batches:
        raise MisconfigurationException(
            f"Argument `accumulate_grad_batches` expected to be {window['batches']}, for the "
            f"checkpoint is from the middle of so many batches, but got {batches}: resume as it "
            f"was, or from another checkpoint."
        )
    parameters = dict(module.named_parameters())
    for name, gradient in window["gradients"].items():
        parameters[name].grad = gradient.to(parameters[name].device, copy=True)


def waiting_row(trainer: Trainer) -> dict[str, Any] | None:
    """Return what Lightning will log of this batch once its last hooks have run, or None."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    connector = trainer._logger_connector
    is_in_hooks = batches.processed > batches.completed
    if not is_in_hooks or trainer.fit_loop._should_accumulate():
        return None
    if not connector.should_update_logs:
        return None
    numbers = {name: float(value) for name, value in connector.metrics["log"].items()}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    return {"step": step, "numbers": numbers | {"epoch": trainer.current_epoch}}


def catch_up(trainer: Trainer, row: dict[str, Any] | None) -> None:
    """Do what Lightning leaves out where it restarts; all ranks call it when training starts.

    A checkpoint of the end of a training batch is from before what the batch logs and before the
    validation run that may follow it, both of which Lightning takes for done.

    Args:
        trainer: A trainer that is fitting.
        row: What ``waiting_row`` returned when the checkpoint was saved.
    """
    if row is not None:
        trainer._logger_connector.log_metrics(row["numbers"], step=row["step"])
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if not loop.restarting or fit._data_fetcher is None:
        return
    if loop.val_loop.restarted_mid_evaluation:
        # Lightning would evaluate as many batches as are left, but the first ones
        loop.val_loop.restarting = False
    epochs, is_last = fit.epoch_progress.current, loop.batch_progress.is_last_batch
    if loop.restarted_on_train_batch_end and is_last:
        _end_epoch(trainer)
    began = epochs.completed
    if loop.restarted_on_train_batch_end and fit.restarted_mid_epoch and is_last:
        # Lightning has counted on to the next epoch, but would not count that as begun
        epochs.completed -= 1
        fit.reset_restart_stage()
    if loop._should_check_val_fx(fit._data_fetcher):
        if loop.restarted_on_train_batch_end:
            trainer.validating = True
            loop.val_loop.restarting = False
            loop.val_loop.run()
            trainer.training = True
        elif loop.restarted_on_last and not loop._should_accumulate():
            # a batch that it is about to count; a signal to stop comes after it has counted it
            loop._batches_that_stepped = trainer.global_step - 1
    epochs.completed = began


def _end_epoch(trainer: Trainer) -> None:
    """Count as many batches as an epoch has now.

    On another number of ranks Lightning would take them up in the middle of the next epoch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    missing = trainer.num_training_batches - progress.ready
    if 0 < missing < float("inf"):
        for count in ("ready", "started", "processed", "completed"):
            setattr(progress, count, getattr(progress, count) + int(missing))


def _own(x: Tensor) -> Tensor:
    return x
