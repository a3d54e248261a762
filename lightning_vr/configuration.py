"""Objects as configurations, so that a module built in Python reloads like one built by the CLI.

A Lightning checkpoint of a CLI run holds ``{"class_path": ..., "init_args": ...}`` and needs no
code to reload. ``describe`` writes the same for live objects: diffusers models know their config,
and a class that keeps each constructor argument under its own name can be read back. A network so
described is rebuilt without memory and compared, and what cannot be described is named, never
guessed.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class UndescribableError(ValueError):
    """An object that no configuration can rebuild."""


def describe(value: Any) -> Any:
    """Return ``value`` as nested primitives and ``class_path`` dictionaries.

    Raises:
        UndescribableError: If it cannot be rebuilt from a configuration.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        if value.args:
            raise UndescribableError("a partial with positional arguments")
        return {"class_path": import_path(value.func), "init_args": describe(value.keywords)}
    if isinstance(value, type) or inspect.isfunction(value) or inspect.isbuiltin(value):
        return import_path(value)
    described = {"class_path": import_path(type(value)), "init_args": _init_args(value)}
    if isinstance(value, nn.Module):
        _check_rebuilds(value, described)
    return described


def import_path(target: Callable[..., Any]) -> str:
    """Return the dotted path that imports ``target``.

    Raises:
        UndescribableError: If it is a lambda or local, so that no import finds it.
    """
    path = f"{target.__module__}.{target.__qualname__}"
    if "<" in path:
        raise UndescribableError(f"{path} cannot be imported")
    return path


def rebuild(described: Any) -> Any:
    """Return the live object of what ``describe`` gave."""
    if isinstance(described, list):
        return [rebuild(item) for item in described]
    if not isinstance(described, dict):
        return described
    if "class_path" not in described:
        return {key: rebuild(item) for key, item in described.items()}
    module, name = described["class_path"].rsplit(".", 1)
    target = getattr(__import__(module, fromlist=[name]), name)
    return target(**rebuild(described.get("init_args", {})))


def _init_args(value: Any) -> dict[str, Any]:
    try:
        parameters = list(inspect.signature(type(value)).parameters.values())
    except (TypeError, ValueError) as error:
        raise UndescribableError(f"{type(value).__name__} has no signature") from error
    config = getattr(value, "config", None)
    source = config if isinstance(config, Mapping) else vars(value)
    if isinstance(value, nn.Module) and source is not config:
        source = {**source, **dict(value.named_children())}
    args = {}
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL or parameter.name not in source:
            raise UndescribableError(
                f"{type(value).__name__} does not keep its argument `{parameter.name}`"
            )
        args[parameter.name] = describe(source[parameter.name])
    return args


def _check_rebuilds(value: nn.Module, described: dict[str, Any]) -> None:
    if not any(True for _ in value.parameters()):
        return
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            again = rebuild(described)
    except Exception as error:
        raise UndescribableError(f"{type(value).__name__} does not rebuild: {error}") from error
    shapes = {name: x.shape for name, x in value.state_dict().items()}
    if shapes != {name: x.shape for name, x in again.state_dict().items()}:
        raise UndescribableError(f"{type(value).__name__} rebuilds with other shapes")
