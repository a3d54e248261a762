"""Objects as configurations, so that a module built in Python reloads like one built by the CLI.

A Lightning checkpoint of a CLI run holds ``{"class_path": ..., "init_args": ...}`` and needs no
code to reload. ``describe`` writes the same for live objects: diffusers models know their config,
and a class that keeps each constructor argument under its own name can be read back. What was read
is accepted only if it is a fixed point: the object rebuilt from it, by the parser that reloads
checkpoints and without memory for its weights, must read the same and have the same structure. An
object that cannot be described is an error, never a guess.
"""

import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.process.network_dtype import DTYPES, InDtype, dtype_name


class UndescribableError(ValueError):
    """An object that no configuration can rebuild."""


def describe(value: Any) -> Any:
    """Return ``value`` as nested primitives and ``class_path`` dictionaries.

    Partials, classes and functions are described only where they are the value or an item of it,
    not inside another object: only an argument's type hint distinguishes them from instances and
    text.

    Raises:
        UndescribableError: If it cannot be rebuilt from a configuration.
    """
    return _walk(value, _describe_leaf)


def import_path(target: Callable[..., Any]) -> str:
    """Return the dotted path that imports ``target``.

    Raises:
        UndescribableError: If it is a lambda or local, which cannot be imported.
    """
    path = f"{target.__module__}.{target.__qualname__}"
    if imported(path) is not target:
        raise UndescribableError(f"{path} cannot be imported")
    return path


def imported(path: str) -> Any:
    """Return what the dotted ``path`` names in the modules imported so far, or None."""
    names = path.split(".")
    for cut in range(len(names) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(names[:cut]))
        if found is not None:
            for name in names[cut:]:
                found = getattr(found, name, None)
            return found
    return None


def rebuild(kind: type, init_args: dict[str, Any]) -> Any:
    """Return the live object of a class and its described arguments."""
    parser = _parser(kind)
    return kind(**parser.instantiate(parser.parse_object(init_args)).as_dict())


@functools.lru_cache(maxsize=64)  # to read signatures and docstrings takes most of the time
def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return parser


def _walk(value: Any, describe_leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_walk(item, describe_leaf) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise UndescribableError("a dictionary has keys that are not strings")
        return {key: _walk(item, describe_leaf) for key, item in value.items()}
    return describe_leaf(value)


def _describe_leaf(value: Any) -> Any:
    if isinstance(value, functools.partial):
        if value.args:
            raise UndescribableError("a partial has positional arguments")
        return {"class_path": import_path(value.func), "init_args": describe(value.keywords)}
    if isinstance(value, type) or inspect.isroutine(value):
        return import_path(value)
    described = _read(value)
    _check_rebuilds(value, described)
    return _with_dtype(value, described) if isinstance(value, nn.Module) else described


def _with_dtype(network: nn.Module, described: dict[str, Any]) -> dict[str, Any]:
    """Add the dtype of a network's weights where it is not the one in which it is rebuilt."""
    try:
        name = dtype_name(network)
    except ValueError as error:
        raise UndescribableError(f"its {error}") from error
    if name is None or DTYPES[name] == torch.get_default_dtype():
        return described
    arguments = {"network": described, "dtype": name}
    return {"class_path": import_path(InDtype), "init_args": arguments}


def _read(value: Any) -> dict[str, Any]:
    """Return the class and the constructor's arguments, as the object keeps them."""
    kind = type(value)
    config = getattr(value, "config", None)
    kept = dict(config if isinstance(config, Mapping) else getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module) and not isinstance(config, Mapping):
        kept.update(value.named_children())
    args = {}
    for parameter in _parameters(kind):
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL or parameter.name not in kept:
            raise UndescribableError(f"{kind.__name__} does not keep `{parameter.name}`")
        args[parameter.name] = _walk(kept[parameter.name], _read)
    return {"class_path": import_path(kind), "init_args": args}


def _parameters(kind: type) -> list[inspect.Parameter]:
    inherited = {"__init__": (object, nn.Module), "__new__": (object,)}
    if all(
        any(getattr(kind, name) is getattr(base, name) for base in bases)
        for name, bases in inherited.items()
    ):
        return []
    try:
        return list(inspect.signature(kind).parameters.values())
    except (TypeError, ValueError) as error:
        raise UndescribableError(f"{kind.__name__} has no signature") from error


def _check_rebuilds(value: Any, described: dict[str, Any]) -> None:
    kind: type = type(value)
    has_weights = isinstance(value, nn.Module) and any(True for _ in value.parameters())
    try:
        reads_the_same, structure = _rebuilt(kind, json.dumps(described), has_weights)
    except Exception as error:
        raise UndescribableError(f"{type(value).__name__} does not rebuild: {error}") from error
    if not reads_the_same or structure != _structure(value):
        raise UndescribableError(f"{type(value).__name__} rebuilds differently")


@functools.lru_cache(maxsize=64)  # sweeps and audits build the same objects again and again
def _rebuilt(kind: type, described_json: str, has_weights: bool) -> tuple[bool, Any]:
    """Return whether what is rebuilt reads the same, and its structure."""
    described = json.loads(described_json)
    with preserve_global_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = _rebuild_lightly(kind, described["init_args"], has_weights)
    return _read(again) == described, _structure(again)


def _rebuild_lightly(kind: type, init_args: dict[str, Any], has_weights: bool) -> Any:
    if has_weights:
        try:
            with torch.device("meta"):
                return rebuild(kind, init_args)
        except Exception:  # a constructor that computes with numbers, as timm's do
            return rebuild(kind, init_args)
    return rebuild(kind, init_args)


def _structure(value: Any) -> Any:
    if not isinstance(value, nn.Module):
        return type(value)
    shapes = {name: getattr(x, "shape", None) for name, x in value.state_dict().items()}
    return shapes, {name: type(part) for name, part in value.named_modules()}
