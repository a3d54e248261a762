"""Hyperparameters that reload: the same whether the CLI or Python built the module.

``save_hyperparameters`` alone would pickle live networks, which ``torch.load`` refuses to read
back.
"""

import inspect
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin, _given_hyperparameters
from lightning.pytorch.utilities.parsing import collect_init_args

from lightning_vr.configuration import UndescribableError, describe

STATE = "lightning_vr"
"""Key of this package's own state in a checkpoint."""


def save_described_hyperparameters(module: LightningModule) -> list[str]:
    """Store the constructor's arguments as configurations; call it from ``__init__``.

    Those of subclasses are included.

    Returns:
        Names of the arguments that cannot be described and are left out.
    """
    frame = inspect.currentframe()
    if _given_hyperparameters.get() is not None or frame is None:
        module.save_hyperparameters()
        return []
    assert isinstance(frame.f_back, FrameType)
    arguments: dict[str, Any] = {}
    for local in collect_init_args(frame.f_back, [], classes=(HyperparametersMixin,)):
        arguments.update(local)
    described: dict[str, Any] = {}
    objects = []
    for name, value in arguments.items():
        try:
            described[name] = describe(value)
        except UndescribableError:
            objects.append(name)
    kind = type(module)
    module.save_hyperparameters(
        {
            **described,
            "_class_path": f"{kind.__module__}.{kind.__qualname__}",
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
        }
    )
    return objects


def class_to_load(
    cls: type[LightningModule], path: Any, given: dict[str, Any]
) -> type[LightningModule]:
    """Return the class that wrote the checkpoint at ``path``.

    Raises:
        ValueError: If that class is not imported, or if an argument that the checkpoint could not
            describe is not ``given``.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    objects = checkpoint.get(STATE, {}).get("objects", [])
    missing = [name for name in objects if name not in given]
    if missing:
        raise ValueError(
            f"Argument `{missing[0]}` of the module in {path} was an object that no configuration "
            f"can rebuild: pass it again, load_from_checkpoint(path, {missing[0]}=...)."
        )
    class_path = checkpoint.get("hyper_parameters", {}).get("_class_path")
    if class_path is None:
        return cls
    for kind in _subclasses(cls):
        package = kind.__module__.partition(".")[0]
        if class_path in (
            f"{kind.__module__}.{kind.__qualname__}",
            f"{package}.{kind.__qualname__}",
        ):
            return kind
    raise ValueError(
        f"The checkpoint {path} holds a {class_path}, which is not imported or is no subclass of "
        f"{cls.__name__}: import the module that defines it, then load again."
    )


def _subclasses(cls: type[LightningModule]) -> list[type[LightningModule]]:
    return [cls, *(kind for child in cls.__subclasses__() for kind in _subclasses(child))]
