"""Files of checkpoints: reading them safely, and whether their weights fit a module."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule
from torch import nn

from lightning_vr.estimators.slot import SLOTS
from lightning_vr.lifecycle.weight_averaging import trained_weights

STATE = "lightning_vr"
"""Key of this package's own state in a checkpoint."""


def read_checkpoint(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint; the weights of a local file stay on disk until used.

    Args:
        path: The checkpoint: a file, its path or an fsspec URL.
        map_location: Where to load the weights, as ``torch.load`` takes it.

    Raises:
        ValueError: If it is no checkpoint, or holds objects that could run code.
    """
    is_local = isinstance(path, (str, Path)) and Path(path).is_file()
    options = {"map_location": map_location, "weights_only": True, "mmap": is_local}
    try:
        if is_local or not isinstance(path, (str, Path)):
            checkpoint = torch.load(path, **options)
        else:
            with get_filesystem(str(path)).open(str(path), "rb") as file:
                checkpoint = torch.load(file, **options)
        checkpoint["state_dict"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = re.split(r"[.:\n]", str(error))[0]
        raise ValueError(
            f"`ckpt_path` must be a checkpoint that loads safely, got {path} ({reason}): name a "
            f"whole file that a ModelCheckpoint wrote."
        ) from error
    assert isinstance(checkpoint, dict)
    return checkpoint


def load_training_weights(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load the weights that training would continue from, where averaged ones are kept as well."""
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(trained_weights(checkpoint), strict=module.strict_loading)


def check_weights(module: nn.Module, checkpoint: dict[str, Any], path: Any) -> None:
    """Raise if the weights of a checkpoint have other names or shapes than the module's.

    What estimators have learned is left out: a module may have other estimators than a checkpoint.

    Raises:
        ValueError: With the first weight that differs, and both shapes.
    """
    saved = _shapes(checkpoint["state_dict"])
    built = _shapes(module.state_dict())
    for name in [*saved, *built]:
        if saved.get(name) != built.get(name):
            raise ValueError(
                f"The checkpoint {path} does not fit the module: `{name}` has shape "
                f"{saved.get(name, '(none)')} there and {built.get(name, '(none)')} as configured: "
                f"configure the network that was trained."
            )


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _shape(x) for name, x in state.items() if name.partition(".")[0] not in SLOTS}


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
