"""Files of checkpoints: reading them safely, and whether their weights fit a module."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule
from torch import nn

from lightning_vr.estimators.slot import SLOTS
from lightning_vr.lifecycle.checkpoint_contents import check_contents
from lightning_vr.lifecycle.file_kinds import file_kind
from lightning_vr.lifecycle.sharded_checkpoints import is_sharded_folder, load_folder
from lightning_vr.lifecycle.weight_averaging import trained_weights

_FORBIDDEN = re.compile(r"(?:GLOBAL|Unsupported (?:global|class|operand)\S*|type) ([\w.]+\.[\w.]+)")


def read_checkpoint(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint; the weights of a local file stay on disk until used.

    Args:
        path: The checkpoint: a file, its path or an fsspec URL.
        map_location: Where to load the weights, as ``torch.load`` takes it.

    Raises:
        ValueError: If it is no checkpoint, or holds objects that could run code.
    """
    is_path = isinstance(path, (str, Path))
    is_local = is_path and "://" not in str(path)
    if is_path and is_sharded_folder(path):
        checkpoint = load_folder(Path(path))
        check_contents(checkpoint, path)
        return checkpoint
    if is_local:
        _check_file(Path(path))
    options = {"map_location": map_location, "weights_only": True}
    if is_local:
        options["mmap"] = zipfile.is_zipfile(path)
    try:
        if is_local or not is_path:
            checkpoint = torch.load(path, **options)
        else:
            with get_filesystem(str(path)).open(str(path), "rb") as file:
                checkpoint = torch.load(file, **options)
    except Exception as error:  # whatever torch meets in a damaged file
        kind = file_kind(Path(path)) if is_local else None
        found = f"which is {kind}" if kind else _reason(error)
        raise ValueError(
            f"`ckpt_path` must be a checkpoint that loads safely, got {path}, {found}: name a "
            f"whole file that a ModelCheckpoint wrote."
        ) from error
    check_contents(checkpoint, path)
    assert isinstance(checkpoint, dict)
    return checkpoint


def load_training_weights(
    module: LightningModule, checkpoint: dict[str, Any], path: Any = "given"
) -> None:
    """Load the weights that training would continue from, where averaged ones are kept as well."""
    module.on_load_checkpoint(checkpoint)
    load_weights(module, trained_weights(checkpoint), path, strict=module.strict_loading)


def load_weights(module: nn.Module, weights: dict[str, Any], path: Any, *, strict: bool) -> None:
    """Load weights, or raise in one line.

    Raises:
        ValueError: If they do not fit.
    """
    try:
        module.load_state_dict(weights, strict=strict)
    except Exception as error:  # a module may read its own state as it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"The checkpoint {path} does not fit the module ({reason}): configure the network and "
            f"the estimators that were trained, or use another checkpoint."
        ) from error


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


def _check_file(path: Path) -> None:
    """Raise if a path leads to no file; others, such as pipes, might never end."""
    if path.is_file():
        return
    found = "a folder" if path.is_dir() else "no file" if path.exists() else None
    if found is None:
        raise ValueError(
            f"`ckpt_path` must be a checkpoint file, but there is no file {path}: correct the path."
        )
    raise ValueError(
        f"`ckpt_path` must be a checkpoint file, got {path}, which is {found}: name a file that a "
        f"ModelCheckpoint wrote."
    )


def _reason(error: Exception) -> str:
    """Return why torch has not read a file, as the end of a sentence."""
    if found := _FORBIDDEN.search(str(error)):
        return f"which holds {found[1]}, an object that could run code"
    text = re.split(r"[.:\n]", str(error))[0].strip() or type(error).__name__
    return f"which is damaged ({text})"


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _shape(x) for name, x in state.items() if name.partition(".")[0] not in SLOTS}


def _shape(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    shape = tuple(value.shape)
    # torch would cast, and drop what the other type cannot hold
    kind = "complex" if value.is_complex() else "whole"
    return shape if value.is_floating_point() else f"{shape} of {kind} numbers"
