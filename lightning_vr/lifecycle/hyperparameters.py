"""Modules that reload from their checkpoint, whether the command line or Python built them.

``save_hyperparameters`` alone would pickle live networks, which ``torch.load`` does not read back
safely. Here a checkpoint holds the constructor's arguments as configurations, beside the class that
they build.
"""

import functools
import inspect
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.saving import _default_map_location
from lightning.pytorch.utilities.parsing import collect_init_args, parse_class_init_keys
from torch import nn

from lightning_vr.core.devices import without_compiler
from lightning_vr.lifecycle.checked_arguments import checked_arguments
from lightning_vr.lifecycle.checkpoint_contents import damaged
from lightning_vr.lifecycle.checkpoints import STATE, check_weights, load_weights, read_checkpoint
from lightning_vr.lifecycle.configuration import UndescribableError, describe, imported
from lightning_vr.lifecycle.trust import Trust

_HYPERPARAMETERS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
_CLASS, _INSTANTIATOR = "_class_path", "_instantiator"  # names that Lightning's own loader reads

_Module = TypeVar("_Module", bound=LightningModule)
_reloading: ContextVar[tuple[type, dict[str, Any]] | None] = ContextVar("reloading", default=None)


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about the constructor's arguments.

    Attributes:
        hyperparameters: The arguments as configurations, and the class.
        objects: Names of arguments that no configuration can rebuild.
        networks: Arguments with weights, by name.
    """

    hyperparameters: dict[str, Any]
    objects: list[str]
    networks: dict[str, nn.Module]

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the description to ``checkpoint``, in place of Lightning's hyperparameters.

        The checkpoint has no weights of a network that is no submodule of ``module``, so that no
        configuration rebuilds such a network either.
        """
        parts = set(map(id, module.modules()))
        foreign = [name for name, network in self.networks.items() if id(network) not in parts]
        checkpoint[_HYPERPARAMETERS] = {
            name: value for name, value in self.hyperparameters.items() if name not in foreign
        }
        checkpoint.setdefault(STATE, {})["objects"] = [*self.objects, *foreign]

    def replace(self, module: LightningModule, name: str, value: Any) -> None:
        """Let an argument of ``module`` have another value from now on, if it has that argument."""
        if name in self.hyperparameters:
            self.hyperparameters[name] = value
            module.save_hyperparameters(dict(self.hyperparameters))


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
        described = dict(checkpoint.get(_HYPERPARAMETERS, {}))
        class_path = described.pop(_CLASS, None)
        described.pop(_INSTANTIATOR, None)
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
                    f"can rebuild it: use load_from_checkpoint(path, {name}=...)."
                )


def describe_arguments(module: LightningModule) -> Description:
    """Describe the arguments that ``module`` is built with, and keep them as its ``hparams``.

    A base class calls it in its own ``__init__``, after ``super().__init__()``. Classes below it
    are to call ``super().__init__`` themselves, as for ``save_hyperparameters``; the arguments of a
    class that does not are not known, and whoever loads the checkpoint has to give them.
    """
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    arguments = _constructor_arguments(module, frame.f_back)
    given = _given_hyperparameters.get()
    if given is not None:
        module.save_hyperparameters()
        return Description(*_as_built(dict(given), arguments), {})
    kind = type(module)
    reloaded, known = _reloading.get() or (None, {})
    known = known if reloaded is kind else {}
    described: dict[str, Any] = {}
    objects = [name for name in _required(kind) if name not in arguments]
    networks = {}
    for name, value in arguments.items():
        value = without_compiler(value) if isinstance(value, nn.Module) else value
        if isinstance(value, nn.Module) and value.state_dict() and name not in known:
            networks[name] = value
        try:
            described[name] = known[name] if name in known else describe(value)
        except UndescribableError:
            objects.append(name)
    described[_CLASS] = f"{kind.__module__}.{kind.__qualname__}"
    described[_INSTANTIATOR] = "lightning.pytorch.cli.instantiate_module"
    module.save_hyperparameters(described)
    return Description(described, objects, networks)


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
    module = _build(kind, described, given, trusted)

    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading if strict is None else strict
    if strict:
        check_weights(module, checkpoint, path)
    load_weights(module, checkpoint["state_dict"], path, strict=strict)
    devices = [x.device for x in checkpoint["state_dict"].values() if isinstance(x, torch.Tensor)]
    return module.to(devices[0]) if devices else module


def class_to_load(cls: type[_Module], class_path: Any, trust: Trust) -> type[_Module]:
    """Return the class that a checkpoint names, or ``cls`` where it is that one or below it.

    Raises:
        ValueError: If it names none that may be built.
    """
    if class_path is None:
        return cls
    if not isinstance(class_path, str):
        raise damaged(f"hyper_parameters.{_CLASS}", "the name of a class", class_path, trust.path)
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


def _as_built(given: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Describe networks that a configuration has by a folder, which need not be there later.

    Returns:
        The configurations of arguments, and the names of those that no configuration can rebuild.
    """
    objects = []
    for name, value in arguments.items():
        settings = given.get(name)
        path = settings.get("class_path") if isinstance(settings, Mapping) else None
        if isinstance(value, nn.Module) and path and _is_other(value, imported(path)):
            try:
                given[name] = describe(value)
            except UndescribableError:
                del given[name]
                objects.append(name)
    return given, objects


def _is_other(network: nn.Module, named: Any) -> bool:
    """Return whether a network is of another class than the one that has made it."""
    return isinstance(named, type) and not isinstance(network, named)


def _constructor_arguments(module: LightningModule, frame: FrameType) -> dict[str, Any]:
    """Return the arguments of the outermost ``__init__`` at work on ``module``, or none.

    Args:
        module: What is being built.
        frame: The ``__init__`` of the base class that asks.
    """
    base = frame.f_locals["__class__"]
    kinds = [kind for kind in type(module).__mro__ if "__init__" in vars(kind)]
    kinds = kinds[kinds.index(base) :: -1]
    calls = collect_init_args(frame, [], classes=(type(module),))
    if len(calls) < len(kinds):
        return {}
    arguments: dict[str, Any] = {}
    # further calls are those of a module that builds this one in its own constructor
    for kind, call in zip(kinds, calls, strict=False):
        _, positional, _ = parse_class_init_keys(kind)
        # what came by position, without a name, has its name in the call further in
        arguments = (arguments if positional else {}) | call
    return arguments


def _required(kind: type) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [x.name for x in parameters if x.default is x.empty and x.kind not in kinds]


def _subclasses(cls: type[_Module]) -> list[type[_Module]]:
    return [cls, *(kind for child in cls.__subclasses__() for kind in _subclasses(child))]


def _build(
    kind: type[_Module], described: dict[str, Any], given: dict[str, Any], trust: Trust
) -> _Module:
    parser = ArgumentParser(exit_on_error=False)
    partials = {name: _partial(value, trust) for name, value in described.items()}
    given = {name: value for name, value in partials.items() if value is not None} | given
    parsed = {name: value for name, value in described.items() if name not in given}
    seen = set(given)
    for base in kind.__mro__[: kind.__mro__.index(LightningModule)]:
        # a `**kwargs` that the parser cannot follow leaves arguments to the base class
        if parsed.keys() - seen:
            seen.update(parser.add_class_arguments(base, skip=seen.copy(), fail_untyped=False))
    try:
        arguments = parser.instantiate(parser.parse_object(parsed)).as_dict()
        with _reload(kind, described):
            return kind(**{name: arguments[name] for name in parsed}, **given)
    except Exception as error:  # whatever a constructor makes of the arguments in a file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"The checkpoint {trust.path} does not rebuild a {kind.__name__}: {reason[:400]}: give "
            f"the argument yourself, or use another checkpoint."
        ) from error


def _partial(described: Any, trust: Trust) -> functools.partial[Any] | None:
    """Return the partial of a function, which the parser would take for a call, or None."""
    if not isinstance(described, dict) or "class_path" not in described:
        return None
    function = trust.find(described["class_path"])
    if not inspect.isroutine(function):
        return None
    return functools.partial(function, **described.get("init_args", {}))


@contextmanager
def _reload(kind: type, described: dict[str, Any]) -> Iterator[None]:
    """Let the module being built keep ``described``, which it could not read back from partials."""
    token = _reloading.set((kind, described))
    try:
        yield
    finally:
        _reloading.reset(token)
