"""Modules rebuilt from their checkpoints: which class, with which arguments, and its weights.

A checkpoint is data from a stranger. What it names is looked up in ``trust.py``, and how large its
networks are is looked at before they are built.
"""

import functools
import inspect
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import _default_map_location
from torch import nn

from lightning_vr.lifecycle.checked_arguments import checked_arguments
from lightning_vr.lifecycle.checkpoint_errors import damaged
from lightning_vr.lifecycle.checkpoints import check_weights, load_weights, read_checkpoint
from lightning_vr.lifecycle.hyperparameters import CLASS, HYPERPARAMETERS, INSTANTIATOR, reload
from lightning_vr.lifecycle.own_state import BASE, STATE
from lightning_vr.lifecycle.trust import Trust

_Module = TypeVar("_Module", bound=LightningModule)
_Arguments = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class SavedArguments:
    """What a checkpoint rebuilds its module from.

    Attributes:
        class_path: The import path of the class, None if the checkpoint does not say.
        described: The constructor's arguments as configurations.
        objects: Names of further arguments, which no configuration can rebuild.
    """

    class_path: str | None
    described: dict[str, Any]
    objects: list[str]

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> "SavedArguments":
        """Read the arguments from a checkpoint; nothing of them is checked."""
        described = dict(checkpoint.get(HYPERPARAMETERS, {}))
        class_path = described.pop(CLASS, None)
        described.pop(INSTANTIATOR, None)
        return cls(class_path, described, checkpoint.get(STATE, {}).get("objects") or [])

    def checked(self, kind: type, trust: Trust, names: Container[str]) -> dict[str, Any]:
        """Return those arguments of ``kind`` that are in ``names``, safe to give to a parser.

        Raises:
            ValueError: If one of them names what is not to be built.
        """
        wanted = {name: value for name, value in self.described.items() if name in names}
        return checked_arguments(trust, kind, wanted)

    def check_complete(self, path: Any, given: Container[str]) -> None:
        """Raise if an argument that no configuration can rebuild is not ``given`` either.

        Raises:
            ValueError: With the name of the argument.
        """
        for name in self.objects:
            if name not in given:
                raise ValueError(
                    f"`{name}` of the module in {path} must be given again, as no configuration "
                    f"can rebuild it: use load_from_checkpoint(path, {name}=...), or its run's "
                    f"config.yaml."
                )


def load_module(
    cls: type[_Module],
    path: Any,
    map_location: Any,
    strict: bool | None,
    given: dict[str, Any],
    trust: Sequence[str] = (),
) -> _Module:
    """Rebuild the module of a checkpoint and load its weights.

    Args:
        cls: The class to load, or a base class of it.
        path: The checkpoint: a file, its path or an fsspec URL.
        map_location: Where to load the weights; their own device if None.
        strict: Whether the names of all weights must match; the module's own choice if None.
        given: Constructor arguments in place of the checkpoint's.
        trust: Packages whose classes may be imported and built, beside those of ``Trust``.

    Raises:
        ValueError: If the class is not imported, if an argument is missing or names what is not to
            be built, or if the weights do not fit.
    """
    trusted = Trust(path, trust)
    checkpoint = read_checkpoint(path, map_location or _default_map_location)
    saved = SavedArguments.of(checkpoint)
    kind = class_to_load(cls, saved.class_path, trusted)
    saved.check_complete(path, given)
    described = saved.checked(kind, trusted, saved.described.keys() - given.keys())
    # parsed once, for the check and for the module: it takes longer than all else
    arguments = functools.cache(lambda: _arguments(kind, described, given, trusted))
    if not given:
        _check_size(kind, described, checkpoint, trusted, strict, arguments)
    module = _build(kind, described, trusted, arguments)

    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading if strict is None else strict
    if strict:
        check_weights(module, checkpoint, path)
    load_weights(module, checkpoint["state_dict"], path, strict=strict)
    devices = [x.device for x in checkpoint["state_dict"].values() if isinstance(x, torch.Tensor)]
    return module.to(devices[0]) if devices else module


def check_size(
    kind: type[LightningModule],
    described: dict[str, Any],
    checkpoint: dict[str, Any],
    trust: Trust,
) -> None:
    """Raise if a module would need more memory than its checkpoint, and does not fit it either.

    Its networks are made without memory, on the meta device. Nothing is said of those that cannot
    be made there, and the module is built twice only where its networks are so large.

    Raises:
        ValueError: With the first weight that differs, and both shapes.
    """
    arguments = functools.partial(_arguments, kind, described, {}, trust)
    _check_size(kind, described, checkpoint, trust, None, arguments)


def _check_size(
    kind: type[LightningModule],
    described: dict[str, Any],
    checkpoint: dict[str, Any],
    trust: Trust,
    strict: bool | None,
    parsed: Callable[[], _Arguments],
) -> None:
    if checkpoint.get(STATE, {}).get(BASE) is not None:
        return  # it holds an adapter alone, and its network is given
    try:
        build = parsed()
        with torch.device("meta"):
            arguments = build()
        networks = [value for value in arguments.values() if isinstance(value, nn.Module)]
        if sum(_size(each.state_dict()) for each in networks) <= _size(checkpoint["state_dict"]):
            return
        with reload(kind, described):
            module = kind(**arguments)
    except Exception:  # whatever a constructor makes of tensors without memory
        return
    if module.strict_loading if strict is None else strict:
        check_weights(module, checkpoint, trust.path)


def class_to_load(cls: type[_Module], class_path: Any, trust: Trust) -> type[_Module]:
    """Return the class that a checkpoint names, or ``cls`` where it is that one or below it.

    Raises:
        ValueError: If it names none that may be built.
    """
    if class_path is None:
        return cls
    if not isinstance(class_path, str):
        raise damaged(f"hyper_parameters.{CLASS}", "the name of a class", class_path, trust.path)
    saved = trust.find(class_path)
    if isinstance(saved, type) and issubclass(saved, LightningModule) and trust.allows(saved):
        if issubclass(saved, cls):
            return saved
        if issubclass(cls, saved):
            return cls
    # a class of a script is `__main__.Name` in one process and `script.Name` in the next
    short = class_path.rpartition(".")[2]
    namesakes = [kind for kind in _subclasses(cls) if kind.__name__ == short]
    if len(namesakes) == 1:
        return namesakes[0]
    raise ValueError(
        f"The checkpoint {trust.path} holds a {class_path}, which is not imported or is no "
        f"subclass of {cls.__name__}: import the module that defines it, or trust its package, as "
        f'in trust=["{class_path.partition(".")[0]}"] or --trust on the command line.'
    )


def _subclasses(cls: type[_Module]) -> list[type[_Module]]:
    return [cls, *(kind for child in cls.__subclasses__() for kind in _subclasses(child))]


def _build(
    kind: type[_Module], described: dict[str, Any], trust: Trust, parsed: Callable[[], _Arguments]
) -> _Module:
    try:
        arguments = parsed()()
        with reload(kind, described):
            return kind(**arguments)
    except Exception as error:  # whatever a constructor makes of the arguments in a file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"The checkpoint {trust.path} does not rebuild a {kind.__name__}: {reason[:400]}: give "
            f"the argument yourself, or use another checkpoint."
        ) from error


def _arguments(
    kind: type[LightningModule], described: dict[str, Any], given: dict[str, Any], trust: Trust
) -> _Arguments:
    """Return what builds the constructor's arguments: those that are described, and those given."""
    partials = {name: _partial(value, trust) for name, value in described.items()}
    given = {name: value for name, value in partials.items() if value is not None} | given
    parsed = {name: value for name, value in described.items() if name not in given}
    known: type = kind
    parser = _parser(known, frozenset(parsed), frozenset(given))
    settings = parser.parse_object(parsed)

    def build() -> dict[str, Any]:
        built = parser.instantiate(settings).as_dict()
        return {name: built[name] for name in parsed} | given

    return build


@functools.lru_cache(maxsize=16)  # to read signatures and docstrings takes most of the time
def _parser(kind: type, parsed: frozenset[str], given: frozenset[str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    seen = set(given)
    for base in kind.__mro__[: kind.__mro__.index(LightningModule)]:
        # a `**kwargs` that the parser cannot follow leaves arguments to the base class
        if parsed - seen:
            seen.update(parser.add_class_arguments(base, skip=seen.copy(), fail_untyped=False))
    return parser


def _size(state: dict[str, Any]) -> int:
    return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))


def _partial(described: Any, trust: Trust) -> functools.partial[Any] | None:
    """Return the partial of a function, which the parser would take for a call, or None."""
    if not isinstance(described, dict) or "class_path" not in described:
        return None
    function = trust.find(described["class_path"])
    if not inspect.isroutine(function):
        return None
    return functools.partial(function, **described.get("init_args", {}))
