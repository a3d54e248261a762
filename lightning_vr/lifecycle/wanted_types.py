"""What an argument takes, as far as its type hint says.

A file may name a class for an argument. Whether that class fits is decided here, from the hint
alone. A hint that is missing, or that cannot be read, is *open*: nothing may be concluded from it.
"""

import collections.abc
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

_NUMBERS = (int, float, complex, bool, bytes, type(None))
_CALLABLE: Any = collections.abc.Callable


@dataclass(frozen=True)
class Wanted:
    """What an argument takes; the items of lists and dictionaries count as the argument's own.

    Attributes:
        objects: Classes of which it takes instances.
        made: Classes of which it takes what makes them: a function, or a class itself.
        classes: Classes of which it takes subclasses, not instances.
        takes_calls: Whether it takes a callable of which no class of results is known.
        takes_text: Whether it takes text that names no class.
        is_open: Whether the hint does not say.
    """

    objects: tuple[type, ...] = ()
    made: tuple[type, ...] = ()
    classes: tuple[type, ...] = ()
    takes_calls: bool = False
    takes_text: bool = False
    is_open: bool = False

    def __or__(self, other: "Wanted") -> "Wanted":
        return Wanted(
            self.objects + other.objects,
            self.made + other.made,
            self.classes + other.classes,
            self.takes_calls or other.takes_calls,
            self.takes_text or other.takes_text,
            self.is_open or other.is_open,
        )

    @property
    def takes_classes(self) -> bool:
        """Whether text may name a class here."""
        return bool(self.objects or self.made or self.classes or self.takes_calls)

    def __str__(self) -> str:
        names = [kind.__name__ for kind in (*self.objects, *self.made)]
        names += [f"subclass of {kind.__name__}" for kind in self.classes]
        return " or ".join(dict.fromkeys(names)) or "network, optimizer or schedule"


OPEN = Wanted(is_open=True)


def wanted(hint: Any) -> Wanted:
    """Return what an argument with this type hint takes."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return wanted(inner[0])
    if origin is Literal:
        return Wanted(takes_text=True)
    if origin in (typing.Union, types.UnionType):
        return _any_of(inner)
    if origin is _CALLABLE or hint in (_CALLABLE, typing.Callable):
        made = wanted(inner[-1]).objects if inner else ()
        return Wanted(made=made, takes_calls=not made)
    if origin is type:
        return Wanted(classes=wanted(inner[0]).objects)
    if isinstance(origin, type) and inner and issubclass(origin, collections.abc.Iterable):
        return _any_of(x for x in inner if x is not Ellipsis)
    if hint in _NUMBERS or hint is None:
        return Wanted()
    kind = origin or hint
    return _of_class(kind) if isinstance(kind, type) else OPEN


def parameter_types(target: Callable[..., Any]) -> dict[str, Wanted]:
    """Return what each argument of a function, or of a class's constructor, takes.

    Arguments that a constructor passes on as ``**kwargs`` are those of its base classes.
    """
    found: dict[str, Wanted] = {}
    for function in _constructors(target) if isinstance(target, type) else [target]:
        hints = _hints(function)
        parameters = inspect.signature(function).parameters.values()
        named = [x for x in parameters if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)]
        for parameter in named:
            found.setdefault(parameter.name, wanted(hints.get(parameter.name, Any)))
        if len(named) == len(parameters):
            break
    return found


def result_type(function: Callable[..., Any]) -> type | None:
    """Return the class that a function says it returns, or None if it does not say."""
    found = _hints(function).get("return")
    return found if isinstance(found, type) else None


def _any_of(hints: Any) -> Wanted:
    found = Wanted()
    for hint in hints:
        found |= wanted(hint)
    return found


def _of_class(kind: type) -> Wanted:
    if issubclass(kind, (str, Enum, os.PathLike)):
        return Wanted(takes_text=True)
    if kind is types.ModuleType:
        return Wanted(objects=(kind,))  # nothing in a file is one: text would be imported
    is_abstract = getattr(kind, "_is_protocol", False) or typing.is_typeddict(kind)
    # much of what runs commands or writes files is an Iterable, a Hashable, an object
    if is_abstract or kind.__module__.partition(".")[0] in sys.stdlib_module_names:
        return OPEN
    return Wanted(objects=(kind,))


def _constructors(kind: type) -> list[Callable[..., Any]]:
    found = (vars(base).get("__init__") for base in kind.__mro__ if base is not object)
    return [function for function in found if inspect.isfunction(function)]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints that can be read; those of types that are not imported cannot."""
    function = inspect.unwrap(function)
    names: Mapping[str, Any] = getattr(function, "__globals__", {})
    found = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        annotated = types.SimpleNamespace(__annotations__={name: hint})
        try:
            found.update(typing.get_type_hints(annotated, dict(names)))
        except Exception:  # whatever a name stands for
            found[name] = Any
    return found
