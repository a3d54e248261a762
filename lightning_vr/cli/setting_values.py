"""Values that the parser takes whatever the type: ``null``, and numbers that are none.

The parser checks the type of every value but ``null``, so that in a file it stands for a number
too; ``.nan`` is a float to it, and no comparison with a bound finds it.
"""

import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from lightning_vr.lifecycle.configuration import imported


def check_values(settings: Namespace, sections: Mapping[str, Any]) -> None:
    """Raise if a setting is ``null`` where its argument must have a value, or not a number.

    Args:
        settings: The settings of a subcommand.
        sections: The classes of sections that are no ``class_path``.

    Raises:
        ValueError: With the full name of the setting.
    """
    for name, value in settings.items(branches=True, nested=False):
        _check(name, value, sections.get(name))


def _check(name: str, value: Any, kind: Any = None) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"`{name}` must be a number, got .nan: use one, or leave it out.")
    if isinstance(value, (list, tuple)):
        for each in value:
            _check(name, each)
    parts = _parts(value)
    if isinstance(parts.get("class_path"), str):
        kind, parts = imported(parts["class_path"]), _parts(parts.get("init_args"))
    for key, part in parts.items():
        if part is None and kind is not None and not _takes_none(kind, key):
            raise ValueError(
                f"`{name}.{key}` must have a value, got null: give it one, or leave it out for its "
                f"default."
            )
        _check(f"{name}.{key}", part)


def _parts(value: Any) -> dict[str, Any]:
    if isinstance(value, Namespace):
        return dict(value.items(branches=True, nested=False))
    return value if isinstance(value, dict) else {}


def _takes_none(kind: Any, name: str) -> bool:
    """Return whether an argument of a class or function may be None, as far as one can tell."""
    for function in _constructors(kind):
        try:
            parameter = inspect.signature(function).parameters.get(name)
            if parameter is None:
                continue
            hint = get_type_hints(function).get(name, Any)
        except (TypeError, ValueError, NameError, AttributeError):
            return True
        return parameter.default is None or _includes_none(hint)
    return True


def _constructors(kind: Any) -> list[Callable[..., Any]]:
    if not isinstance(kind, type):
        return [kind] if callable(kind) else []
    # further arguments go to a base class
    return [vars(each)["__init__"] for each in kind.__mro__[:-1] if "__init__" in vars(each)]


def _includes_none(hint: Any) -> bool:
    if hint in (Any, None, type(None), object) or isinstance(hint, (TypeVar, str)):
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(map(_includes_none, get_args(hint)))
    return False
