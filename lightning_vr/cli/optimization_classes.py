"""An optimizer in a configuration must be one: the parser takes any function for a callable."""

from typing import Any

from jsonargparse import Namespace

from lightning_vr.lifecycle.configuration import imported
from lightning_vr.lifecycle.wanted_types import parameter_types, result_type

_EXAMPLES = {"optimizer": "AdamW", "lr_scheduler": "StepLR"}


def check_optimization_classes(model: Namespace | None) -> None:
    """Raise if an argument that makes an object names what makes none.

    Args:
        model: The settings of the section ``model``.

    Raises:
        ValueError: With the setting, and what it must be.
    """
    kind = imported(model.class_path) if model is not None else None
    if model is None or not isinstance(kind, type):
        return
    types = parameter_types(kind)
    arguments = model.get("init_args")
    for name, value in vars(arguments).items() if arguments else ():
        made = types[name].made if name in types else ()
        if value is None or not made:
            continue
        found, given = value, value
        if isinstance(value, Namespace):
            given = value.class_path
            found = imported(given)
        if not _makes(found, made, is_called=isinstance(value, Namespace)):
            wanted = " or ".join(dict.fromkeys(base.__name__ for base in made))
            raise ValueError(
                f"`model.{name}` must be a class of {wanted}, got {given}, which is none: use "
                f"{_EXAMPLES.get(name, 'one')}, or the full path of a class of your own."
            )


def _makes(found: Any, made: tuple[type, ...], *, is_called: bool) -> bool:
    """Return whether it is a class of one that is wanted, or a function that says it returns one.

    Args:
        found: A class or function.
        made: The classes wanted.
        is_called: Whether the parser would call a function for its result.
    """
    if isinstance(found, type):
        return issubclass(found, made)
    result = None if is_called or not callable(found) else result_type(found)
    return result is not None and issubclass(result, made)
