"""Modules that reload from their checkpoint, whether the command line or Python built them.

``save_hyperparameters`` alone would pickle live networks, which ``torch.load`` does not read back
safely. Here a checkpoint holds the constructor's arguments as configurations, beside the class that
they build.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.parsing import collect_init_args, parse_class_init_keys
from torch import nn

from lightning_vr.core.devices import without_compiler
from lightning_vr.lifecycle.configuration import UndescribableError, describe, imported
from lightning_vr.lifecycle.own_state import STATE

HYPERPARAMETERS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
CLASS, INSTANTIATOR = "_class_path", "_instantiator"  # names that Lightning's own loader reads

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
        checkpoint[HYPERPARAMETERS] = {
            name: value for name, value in self.hyperparameters.items() if name not in foreign
        }
        checkpoint.setdefault(STATE, {})["objects"] = [*self.objects, *foreign]

    def replace(self, module: LightningModule, name: str, value: Any) -> None:
        """Let an argument of ``module`` have another value from now on, if it has that argument."""
        if name in self.hyperparameters:
            self.hyperparameters[name] = value
            module.save_hyperparameters(dict(self.hyperparameters))


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
    described[CLASS] = f"{kind.__module__}.{kind.__qualname__}"
    described[INSTANTIATOR] = "lightning.pytorch.cli.instantiate_module"
    module.save_hyperparameters(described)
    return Description(described, objects, networks)


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
    """Return whether a network was made by a function, or is of another class than its maker."""
    return not (isinstance(named, type) and isinstance(network, named))


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


@contextmanager
def reload(kind: type, described: dict[str, Any]) -> Iterator[None]:
    """Let the module of class ``kind`` being built keep ``described`` as its arguments.

    It could not read them back from partials.
    """
    token = _reloading.set((kind, described))
    try:
        yield
    finally:
        _reloading.reset(token)
