"""What this package keeps in a checkpoint, field by field, before anything is taken from it.

A field of another kind need not fail where it is read: a number of batches that is none may let a
loop run for ever, and a seed that is none lets a run train on other draws than it says.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_vr.lifecycle.checkpoint_errors import damaged
from lightning_vr.lifecycle.epoch_position import Due

STATE = "lightning_vr"
"""Key of this package's own state in a checkpoint."""

BASE = "base"
"""Field of the weights that an adapter was trained on, where a checkpoint holds it alone."""

Check = Callable[[Any, str, Any], None]
"""``(value, name, path)``: raises if a value is not what a field of that name must be."""


def check_own_state(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Raise if this package's own state in a checkpoint is damaged.

    Raises:
        ValueError: With the first field that is not what it must be.
    """
    _record(_FIELDS)(checkpoint.get(STATE, {}), STATE, path)


def check_own_state_of_fit(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Raise if a checkpoint of a run lacks the seed or the position that it would go on from.

    Raises:
        ValueError: With the field.
    """
    if STATE in checkpoint and checkpoint["global_step"] > 0:
        for name in ("seed", "position"):
            if checkpoint[STATE].get(name) is None:
                raise damaged(f"{STATE}.{name}", "what the run has saved", None, path)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def has_names(value: Any) -> bool:
    """Return whether a value is a mapping from text."""
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _of(allowed: str, accepts: Callable[[Any], bool]) -> Check:
    def check(value: Any, name: str, path: Any) -> None:
        if not accepts(value):
            raise damaged(name, allowed, value, path)

    return check


def _optional(check: Check) -> Check:
    def check_unless_none(value: Any, name: str, path: Any) -> None:
        if value is not None:
            check(value, name, path)

    return check_unless_none


def _list_of(each: Check, allowed: str) -> Check:
    def check(value: Any, name: str, path: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise damaged(name, allowed, value, path)
        for part in value:
            each(part, name, path)

    return check


def _by_name(each: Check) -> Check:
    def check(value: Any, name: str, path: Any) -> None:
        if not has_names(value):
            raise damaged(name, "values by name", value, path)
        for key, part in value.items():
            each(part, f"{name}.{key}", path)

    return check


def _record(fields: Mapping[str, Check], *, is_whole: bool = False) -> Check:
    """Return the check of fields: those that are there, or all of them."""

    def check(value: Any, name: str, path: Any) -> None:
        if not has_names(value):
            raise damaged(name, "what a run has saved", value, path)
        for key, each in fields.items():
            if is_whole or key in value:
                each(value.get(key), f"{name}.{key}", path)

    return check


def _check_sum(value: Any, name: str, path: Any) -> None:
    """Raise if a sum over an epoch is neither lost nor whole."""
    lost = isinstance(value, Mapping) and value.get("value") is None
    fields = {"name": _TEXT} if lost else _SUM
    _record(fields, is_whole=True)(value, name, path)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value <= torch.finfo(torch.float32).max


_COUNT = _of("a number of 0 or more", is_count)
_NUMBER = _of("a number", lambda value: isinstance(value, (int, float)))
_FLAG = _of("true or false", lambda value: isinstance(value, bool))
_TEXT = _of("text", lambda value: isinstance(value, str))
_TENSOR = _of("a tensor", lambda value: isinstance(value, Tensor))
_SIZE = _of("sizes of 1 or more", lambda value: is_count(value) and value > 0)
_DUE = _of(f"one of {', '.join(get_args(Due))}", lambda value: value in get_args(Due))

_SUM = {"name": _TEXT, "logged": _TEXT, "value": _TENSOR, "count": _optional(_TENSOR)}
_POSITION = {
    "epoch": _COUNT,
    "has_begun": _FLAG,
    "batches": _COUNT,
    "is_over": _FLAG,
    "due": _DUE,
    "left": _list_of(_TEXT, "names of hooks"),
    "total_batches": _COUNT,
    "steps": _COUNT,
    "logged_steps": _COUNT,
    "is_cut": _FLAG,
    "torn": _optional(_TEXT),
    "data": _optional(_TEXT),
    "sizes": _list_of(_list_of(_optional(_COUNT), "sizes"), "sizes of training loaders"),
}
_WINDOW = {"batches": _COUNT, "gradients": _by_name(_TENSOR), "lost": _COUNT}
_ROW = {"step": _COUNT, "numbers": _by_name(_NUMBER), "metrics": _by_name(_TENSOR)}
_FIELDS = {
    BASE: _optional(_record({"folder": _TEXT, "digest": _TEXT}, is_whole=True)),
    "seed": _optional(_COUNT),
    "is_averaged": _FLAG,
    "skipped": _COUNT,
    "sample_calls": _COUNT,
    "sigma_data": _optional(_of("positive and finite", _is_positive)),
    "objects": _optional(_list_of(_TEXT, "names of arguments")),
    "sample_shape": _optional(_list_of(_SIZE, "sizes of 1 or more")),
    "position": _record(_POSITION, is_whole=True),
    "window": _optional(_record(_WINDOW, is_whole=True)),
    "row": _optional(_record(_ROW, is_whole=True)),
    "metrics": _by_name(_TENSOR),
    "sums": _by_name(_check_sum),
    "csv_rows": _optional(_by_name(_COUNT)),
}
