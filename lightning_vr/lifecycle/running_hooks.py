"""Which callbacks a hook has not reached yet, when a checkpoint is saved or an error raised in it.

Lightning calls a hook of one callback after the other and keeps no record of it. The record is the
stack, or the traceback of the error that ends the run.

Names of Lightning's functions and of their variables are as seen in version 2.6.
"""

import sys
from collections.abc import Iterator
from traceback import walk_stack, walk_tb
from types import FrameType

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.trainer.call import _call_callback_hooks, _call_lightning_module_hook

from lightning_vr.lifecycle.trainer_callbacks import callbacks_of

MODULE = "module"
"""Stands for the module where callbacks have names."""

_CALLBACKS_CODE = _call_callback_hooks.__code__
_MODULE_CODE = _call_lightning_module_hook.__code__
_MONITORING = (EarlyStopping, Checkpoint)


def callback_names(trainer: Trainer) -> dict[str, Callback]:
    """Return the callbacks by names that are the same in the next run."""
    named: dict[str, Callback] = {}
    counts: dict[str, int] = {}
    for callback in callbacks_of(trainer):
        key = callback.state_key
        counts[key] = counts.get(key, 0) + 1
        named[f"{key}#{counts[key]}"] = callback
    return named


def unfinished(trainer: Trainer, hook: str) -> list[str] | None:
    """Return whose ``hook`` has not ended in the call that saves or has raised, in order.

    Args:
        trainer: The trainer.
        hook: One of ``on_train_batch_end``, ``on_validation_end`` and ``on_train_epoch_end``.

    Returns:
        Names of callbacks, and ``MODULE``. What saves counts as ended, what raises does not. None
        if the hook is not being called.
    """
    for frame, has_raised in _calls(trainer):
        if frame.f_locals.get("hook_name") == hook:
            left = _left(trainer, frame, has_raised, hook)
            names = {id(callback): name for name, callback in callback_names(trainer).items()}
            return [names.get(id(each), MODULE) for each in left]
    return None


def everyone(trainer: Trainer) -> list[str]:
    """Return the names of all callbacks, and that of the module."""
    return [*callback_names(trainer), MODULE]


def call_rest(trainer: Trainer, hook_name: str, left: list[str]) -> None:
    """Call a hook of what ``unfinished`` has returned; what is not there any more is left out."""
    named, module = callback_names(trainer), trainer.lightning_module
    callbacks = [named.get(name) for name in left if name == MODULE or name in named]
    for callback in callbacks:
        if callback is None:
            _call_lightning_module_hook(trainer, hook_name)
            continue
        module._current_fx_name, before = hook_name, module._current_fx_name
        getattr(callback, hook_name)(trainer, module)
        module._current_fx_name = before


def _calls(trainer: Trainer) -> Iterator[tuple[FrameType, bool]]:
    """Yield Lightning's calls of this trainer's hooks, and whether they have raised."""
    frames = [(frame, False) for frame, _ in walk_stack(None)]
    if trainer.interrupted:
        frames += [(frame, True) for frame, _ in walk_tb(sys.exc_info()[2])]
    for frame, has_raised in frames:
        is_call = frame.f_code in (_CALLBACKS_CODE, _MODULE_CODE, call_rest.__code__)
        if is_call and frame.f_locals.get("trainer") is trainer:
            yield frame, has_raised


def _left(trainer: Trainer, frame: FrameType, has_raised: bool, hook: str) -> list[Callback | None]:
    """Return the callbacks that the hook has not ended for, None for the module."""
    values = frame.f_locals
    by_kind = hook == "on_train_epoch_end"  # callbacks that monitor come after the module
    callbacks = callbacks_of(trainer)
    last = [each for each in callbacks if isinstance(each, _MONITORING)] if by_kind else []
    if frame.f_code is _MODULE_CODE:
        return [*([None] if has_raised else []), *last]
    reached = values["callbacks"]
    at = next(i for i, each in enumerate(reached) if each is values["callback"])
    rest = list(reached[at + (not has_raised) :])
    if frame.f_code is call_rest.__code__ or (by_kind and values["monitoring_callbacks"]):
        return rest
    return [*rest, None, *last]
