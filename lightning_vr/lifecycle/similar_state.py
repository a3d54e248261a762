"""Whether a saved state holds values of the kinds that a new object of its class has.

torch's schedules and Lightning's callbacks take what a checkpoint says as it is. A count that is
none would end in a traceback after some steps, or never; a rate that is none would be trained with.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.lifecycle.checkpoint_errors import damaged
from lightning_vr.lifecycle.own_state import has_names
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of

_LARGEST = torch.finfo(torch.float32).max
_LARGEST_COUNT = 2**53
"""What a whole number may be that was saved as a floating-point one."""


def check_callbacks(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Raise if a saved state is none of the callback of this package or Lightning that it is for.

    Those of others may have no state before they run.

    Raises:
        ValueError: With the value that is not what it must be.
    """
    for callback in callbacks_of(trainer):
        saved, name = checkpoint["callbacks"], callback.state_key
        if type(callback).__module__.startswith("lightning") and name in saved:
            kind = f"callbacks.{type(callback).__name__}"
            check_similar(saved[name], callback.state_dict(), kind, trainer.ckpt_path)


def check_similar(saved: Any, own: Any, name: str, path: Any) -> None:
    """Raise if a value of a saved state is of another kind than that of a new object.

    Nothing is said of values that a new object has no kind for, and of those that are not saved.

    Args:
        saved: A saved state, or a part of it.
        own: The same part of the state of a new object.
        name: What it is called.
        path: The checkpoint.

    Raises:
        ValueError: With the first value that is not what it must be.
    """
    if own is None:
        return
    if isinstance(own, Mapping):
        _check_mapping(saved, own, name, path)
    elif isinstance(own, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or (own and not saved):
            raise damaged(name, "a list", saved, path)
        for each in saved if own else ():
            check_similar(each, own[0], name, path)
    elif isinstance(own, bool):
        _check(isinstance(saved, bool), name, "true or false", saved, path)
    elif isinstance(own, int):
        least = min(own, 0)
        _check(_is_whole(saved) and saved >= least, name, f"{least} or more", saved, path)
    elif isinstance(own, float):
        _check(_is_number(saved, own), name, "a number within float32", saved, path)
    elif isinstance(own, (str, Tensor)):
        kind = Tensor if isinstance(own, Tensor) else str
        _check(isinstance(saved, kind), name, f"a {kind.__name__.lower()}", saved, path)


def _check_mapping(saved: Any, own: Mapping[Any, Any], name: str, path: Any) -> None:
    if not isinstance(saved, Mapping) or (own and not saved):
        raise damaged(name, "values by name", saved, path)
    if has_names(own):
        for key in own.keys() & saved.keys():
            check_similar(saved[key], own[key], f"{name}.{key}", path)


def _check(holds: bool, name: str, allowed: str, saved: Any, path: Any) -> None:
    if not holds:
        raise damaged(name, allowed, saved, path)


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer() and abs(value) < _LARGEST_COUNT
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, own: float) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    if not isinstance(value, (int, float)) or math.isnan(value):
        return False
    return abs(value) <= _LARGEST or not math.isfinite(own)
