"""Restarts a run at its position: Lightning's counters are set, and what was due is done.

Lightning's own restart guesses from its counters which hooks have run. Here its loops are taken
past that guess and then set; what was due they do themselves, by their own functions.

Private attributes of Lightning's loops are as seen in version 2.6.
"""

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_vr.lifecycle.epoch_position import EpochPosition, training_sizes
from lightning_vr.lifecycle.running_hooks import MODULE, call_rest, callback_names

Row = dict[str, Any]
"""Numbers that a checkpoint waits to log, and their step."""


def restart(
    trainer: Trainer, position: EpochPosition, row: Row | None, begin: Callable[[], None]
) -> None:
    """Restart a trainer at a position; all ranks call it last in ``on_train_start``.

    Args:
        trainer: The trainer, whose counters were restored by ``EpochPosition.put_into``.
        position: The position.
        row: The pending numbers.
        begin: What to call when the counters are set, before anything that was due is done.

    Raises:
        MisconfigurationException: If it is in the middle of an epoch of other data.
    """
    _check_data(trainer, position)
    _tell(trainer, position)
    fit = trainer.fit_loop
    fit._restarting = False
    fit.reset_restart_stage()
    for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
        progress.load_state_dict(position.epoch_counts())
    if position.has_begun and position.due != "epoch_end":
        fit._restart_stage = RestartStage.RESTARTED_MID_EPOCH
        _reset_once(trainer, lambda: _go_on(trainer, position, row, begin))
        return
    _set_batches(trainer, position)
    begin()
    if position.due == "epoch_end":
        _end_epoch(trainer, position, row)


def forget_restart(trainer: Trainer) -> None:
    """Undo what a restart has prepared, if its run has ended before it began."""
    trainer.fit_loop.epoch_loop.__dict__.pop("reset", None)


def log_row(trainer: Trainer, row: Row | None) -> None:
    """Log the pending numbers, if there are any."""
    if row is not None:
        trainer._logger_connector.log_metrics(row["numbers"], step=row["step"])


def _reset_once(trainer: Trainer, then: Callable[[], None]) -> None:
    """Let the loop over batches call ``then`` after its first reset, which would change counters.

    No hook comes between that reset and the first batch.
    """
    loop: Any = trainer.fit_loop.epoch_loop

    def reset() -> None:
        forget_restart(trainer)
        loop._restarting = True  # for its warning of loaders that do not resume
        loop.reset()
        then()

    loop.reset = reset


def _set_batches(trainer: Trainer, position: EpochPosition) -> None:
    """Set what Lightning counts within an epoch."""
    loop = trainer.fit_loop.epoch_loop
    loop._restarting = loop.val_loop._restarting = False
    loop.reset_restart_stage()
    loop.val_loop.reset_restart_stage()
    loop._skip_next_val = False
    loop._batches_that_stepped = position.logged_steps
    batches = position.batches
    if position.is_over and trainer.num_training_batches < float("inf"):
        batches = int(trainer.num_training_batches)  # on other ranks an epoch has another number
    progress: Any = loop.batch_progress
    for counts, number in ((progress.current, batches), (progress.total, position.total_batches)):
        counts.reset()
        counts.increment_by(number)
    progress.is_last_batch = position.is_over or not position.has_begun


def _go_on(
    trainer: Trainer, position: EpochPosition, row: Row | None, begin: Callable[[], None]
) -> None:
    """Do what was due after the last batch."""
    _set_batches(trainer, position)
    begin()
    loop, due = trainer.fit_loop.epoch_loop, position.due
    if due == "batch_end":
        _update_averages(trainer, position.left)
    log_row(trainer, row)
    if due == "validation_end":
        trainer.validating = True
        call_rest(trainer, "on_validation_end", position.left)
        trainer.training = True
    if due != "nothing":
        loop._skip_next_val = due in ("validation_end", "after_validation")
        assert trainer.fit_loop._data_fetcher is not None
        loop.on_advance_end(trainer.fit_loop._data_fetcher)


def _end_epoch(trainer: Trainer, position: EpochPosition, row: Row | None) -> None:
    """Do what was left of the end of an epoch, as Lightning's ``_FitLoop.on_advance_end`` does."""
    fit, connector = trainer.fit_loop, trainer._logger_connector
    call_rest(trainer, "on_train_epoch_end", position.left)
    connector.on_epoch_end()
    fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if row is not None:
        row["numbers"] |= {name: float(x) for name, x in connector.metrics["log"].items()}
    log_row(trainer, row)
    connector.reset_results()
    fit.epoch_progress.increment_completed()


def _update_averages(trainer: Trainer, left: list[str]) -> None:
    """Let averages take in the weights after the last step, which is all that they need of it."""
    named, module = callback_names(trainer), trainer.lightning_module
    for name in left:
        callback = named.get(name)
        if isinstance(callback, WeightAveraging):
            index = trainer.fit_loop.batch_idx
            callback.on_train_batch_end(trainer, module, None, None, index)


def _check_data(trainer: Trainer, position: EpochPosition) -> None:
    if not position.is_within_epoch:
        return
    now, batches = training_sizes(trainer), trainer.num_training_batches
    if now != position.sizes:
        raise MisconfigurationException(
            f"The training set must have the size of the checkpoint's, which is from the middle of "
            f"an epoch ([samples, samples per step] of each loader: {position.sizes}), got {now}: "
            f"resume with the same data, or from a checkpoint of the end of an epoch."
        )
    if position.batches > batches:
        raise MisconfigurationException(
            f"`limit_train_batches` must leave {position.batches} batches or more in an epoch, as "
            f"the checkpoint was saved after so many, got {batches}: use a higher limit."
        )


def _tell(trainer: Trainer, position: EpochPosition) -> None:
    """Say what cannot be as if the run had not stopped."""
    if position.torn is not None:
        rank_zero_warn(
            f"The checkpoint was saved {position.torn}: the run goes on, but not as if it had not "
            f"stopped. Resume from an earlier checkpoint for that."
        )
    elif position.due == "batch_end" and (names := _missed(trainer, position.left)):
        rank_zero_warn(
            f"The checkpoint was saved in `on_train_batch_end` before {', '.join(names)}, which "
            f"has not seen the end of that batch: save in a later hook, or let what saves be the "
            f"last callback."
        )
    if position.is_cut:
        rank_zero_info(
            f"The earlier run ended within epoch {position.epoch}, after {position.batches} "
            f"batches: callbacks had `on_train_epoch_end` then, and have it again at its end."
        )


def _missed(trainer: Trainer, left: list[str]) -> list[str]:
    """Return whose ``on_train_batch_end`` is lost, of those that may keep something."""
    named, found = callback_names(trainer), []
    for name in left:
        callback = named.get(name)
        if isinstance(callback, WeightAveraging):
            continue
        is_module = name == MODULE and _is_users(trainer.lightning_module)
        if is_module or (callback is not None and _is_users(callback) and callback.state_dict()):
            kind = type(trainer.lightning_module if callback is None else callback)
            found.append(f"`{kind.__name__}.on_train_batch_end`")
    return found


def _is_users(each: Any) -> bool:
    """Return whether a hook at the end of batches is no base class's, which keeps nothing."""
    hook = getattr(each.on_train_batch_end, "__func__", each.on_train_batch_end)
    module: str = getattr(hook, "__module__", "")
    return not module.startswith(("lightning.pytorch.", "lightning_vr.lifecycle."))
