"""Modules that reload from their checkpoint, whether the command line or Python built them.

``save_hyperparameters`` alone would pickle live networks, which ``torch.load`` refuses to read
back; here a checkpoint holds the constructor's arguments as configurations.
"""

import functools
import importlib
import inspect
import pickle
from collections.abc import Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.saving import _default_map_location
from torch import nn

from lightning_vr.lifecycle.configuration import UndescribableError, describe, imported

STATE = "lightning_vr"
"""Key of this package's own state in a checkpoint."""

HYPERPARAMETERS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
"""Key of the constructor's arguments in a checkpoint, as Lightning has it."""

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

        A network that the module does not hold as its part is none of the checkpoint's weights, so
        no configuration rebuilds it either.
        """
        parts = set(map(id, module.modules()))
        foreign = [name for name, network in self.networks.items() if id(network) not in parts]
        checkpoint[HYPERPARAMETERS] = {
            name: value for name, value in self.hyperparameters.items() if name not in foreign
        }
        checkpoint.setdefault(STATE, {})["objects"] = [*self.objects, *foreign]


def describe_arguments(module: LightningModule) -> Description:
    """Describe the arguments ``module`` is built with; call it from a base class's ``__init__``."""
    given = _given_hyperparameters.get()
    if given is not None:
        module.save_hyperparameters()
        return Description(dict(given), [], {})
    kind = type(module)
    reloaded, known = _reloading.get() or (None, {})
    known = known if reloaded is kind else {}
    described: dict[str, Any] = {}
    objects, networks = [], {}
    for name, value in _arguments(module).items():
        if isinstance(value, nn.Module) and value.state_dict() and name not in known:
            networks[name] = value
        try:
            described[name] = known[name] if name in known else describe(value)
        except UndescribableError:
            objects.append(name)
    described["_class_path"] = f"{kind.__module__}.{kind.__qualname__}"
    described["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    module.save_hyperparameters(described)
    return Description(described, objects, networks)


def load_module(
    cls: type[_Module], path: Any, map_location: Any, strict: bool | None, given: dict[str, Any]
) -> _Module:
    """Rebuild the module of a checkpoint and load its weights.

    Args:
        cls: The class to load, or a base class of it.
        path: The checkpoint: a file, its path or an fsspec URL.
        map_location: Where to load the weights; their own device if None.
        strict: Whether the names of all weights must match; the module's own choice if None.
        given: Constructor arguments in place of the checkpoint's.

    Raises:
        ValueError: If the class is not imported, if an argument is missing, or if the weights do
            not fit.
    """
    checkpoint = read_checkpoint(path, map_location or _default_map_location)
    described = dict(checkpoint.get(HYPERPARAMETERS, {}))
    kind = _class_to_load(cls, described.pop("_class_path", None), path)
    described.pop("_instantiator", None)
    check_complete(checkpoint, path, given)
    described = {name: value for name, value in described.items() if name not in given}
    module = _build(kind, described, given, path)

    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading if strict is None else strict
    if strict:
        check_weights(module, checkpoint, path)
    module.load_state_dict(checkpoint["state_dict"], strict=strict)
    devices = [x.device for x in checkpoint["state_dict"].values() if isinstance(x, torch.Tensor)]
    return module.to(devices[0]) if devices else module


def read_checkpoint(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Return a checkpoint's content, from a local file without reading its weights.

    Raises:
        ValueError: If it is no checkpoint, or holds objects that could run code.
    """
    is_local = isinstance(path, (str, Path)) and Path(path).is_file()
    how = {"map_location": map_location, "weights_only": True, "mmap": is_local}
    try:
        if is_local or not isinstance(path, (str, Path)):
            checkpoint = torch.load(path, **how)
        else:
            with get_filesystem(str(path)).open(str(path), "rb") as file:
                checkpoint = torch.load(file, **how)
        checkpoint["state_dict"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint that loads safely: {error}") from error
    assert isinstance(checkpoint, dict)
    return checkpoint


def load_training_weights(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load the weights that training would go on from, not averaged ones that were kept as well."""
    module.on_load_checkpoint(checkpoint)
    weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
    module.load_state_dict(weights, strict=module.strict_loading)


def check_complete(checkpoint: dict[str, Any], path: Any, given: Container[str]) -> None:
    """Refuse a checkpoint that misses an argument which is not ``given`` either."""
    for name in checkpoint.get(STATE, {}).get("objects", []):
        if name not in given:
            raise ValueError(
                f"Argument `{name}` of the module in {path} was an object that no configuration "
                f"can rebuild: give it again, as in load_from_checkpoint(path, {name}=...)."
            )


def check_weights(module: nn.Module, checkpoint: dict[str, Any], path: Any) -> None:
    """Refuse a checkpoint whose weights have other names or shapes than the module's.

    What estimators have learned is none of them: they may be others than the checkpoint's.
    """
    saved = _shapes(checkpoint["state_dict"])
    built = _shapes(module.state_dict())
    for name in [*saved, *built]:
        if saved.get(name) != built.get(name):
            raise ValueError(
                f"The checkpoint {path} does not fit the module: `{name}` has shape "
                f"{saved.get(name, '(none)')} there and {built.get(name, '(none)')} as configured. "
                f"Configure the network as it was."
            )


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    slots = ("draws.", "target.", "control_variate.")
    return {name: _shape(value) for name, value in state.items() if not name.startswith(slots)}


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _arguments(module: LightningModule) -> dict[str, Any]:
    """Return the arguments of the outermost ``__init__`` that is at work on ``module``."""
    arguments: dict[str, Any] = {}
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        names, rest, keywords, values = inspect.getargvalues(frame)
        if frame.f_code.co_name == "__init__" and names and values.get(names[0]) is module:
            # what came by position, without a name, has its name further in
            further_in = arguments if values.get(rest or "") else {}
            named = {name: values[name] for name in names[1:]}
            arguments = further_in | named | values.get(keywords or "", {})
        frame = frame.f_back
    return arguments


def _class_to_load(cls: type[_Module], class_path: str | None, path: Any) -> type[_Module]:
    if class_path is None:
        return cls
    saved = imported(class_path)
    if isinstance(saved, type) and issubclass(saved, cls):
        return saved
    if isinstance(saved, type) and issubclass(cls, saved):
        return cls
    # a class of a script is `__main__.Name` in one process and `script.Name` in the next
    name = class_path.rpartition(".")[2]
    alike = [kind for kind in _subclasses(cls) if kind.__name__ == name]
    if len(alike) == 1:
        return alike[0]
    raise ValueError(
        f"The checkpoint {path} holds a {class_path}, which is not imported or is no subclass of "
        f"{cls.__name__}: import the module that defines it, then load again."
    )


def _subclasses(cls: type[_Module]) -> list[type[_Module]]:
    return [cls, *(kind for child in cls.__subclasses__() for kind in _subclasses(child))]


def _build(
    kind: type[_Module], described: dict[str, Any], given: dict[str, Any], path: Any
) -> _Module:
    parser = ArgumentParser(exit_on_error=False)
    partials = {name: _partial(value) for name, value in described.items()}
    given = {name: value for name, value in partials.items() if value is not None} | given
    parsed = {name: value for name, value in described.items() if name not in given}
    seen = set(given)
    for base in kind.__mro__[: kind.__mro__.index(LightningModule)]:
        # a `**kwargs` that the parser cannot follow leaves arguments to the base class
        if parsed.keys() - seen:
            seen.update(parser.add_class_arguments(base, skip=seen.copy(), fail_untyped=False))
    try:
        config = parser.parse_object(parsed)
    except ArgumentError as error:
        raise ValueError(
            f"The checkpoint {path} does not rebuild a {kind.__name__}: {error}"
        ) from error
    arguments = parser.instantiate(config).as_dict()
    with _reload(kind, described):
        return kind(**{name: arguments[name] for name in parsed}, **given)


def _partial(described: Any) -> functools.partial[Any] | None:
    """Return the partial of a function, which the parser would take for a call, or None."""
    if not isinstance(described, dict) or "class_path" not in described:
        return None
    module, _, name = described["class_path"].rpartition(".")
    function = getattr(importlib.import_module(module), name, None)
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
