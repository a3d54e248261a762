"""Checkpoints that are whole or not there, and a full disk that does not end a run.

A checkpoint is written beside its place, made durable and then moved there, which is atomic on one
file system: a process that is killed at any moment leaves the former file or the new one. If the
disk is full the run goes on with a warning, and nothing that the new checkpoint was to replace is
removed before one has been written again.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

_PARTIAL = ".partial"


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and survives a disk that cannot take one.

    A ``DiffusionModule`` puts it in place of Lightning's plain one; for other modules give it to
    the trainer: ``Trainer(plugins=[DurableCheckpointIO()])``.
    """

    def __init__(self) -> None:
        self._has_failed = False
        self._replaced: list[Any] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, or warn that the disk does not take it."""
        try:
            if "://" in str(path) or storage_options is not None:
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                _write(checkpoint, Path(path))
        except OSError as error:
            self._has_failed = True
            rank_zero_warn(
                f"The checkpoint {path} could not be written ({error}): training goes on, and the "
                f"checkpoints before it stay. Make room on the disk."
            )
            return
        self._has_failed = False
        while self._replaced:
            super().remove_checkpoint(self._replaced.pop())

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, unless the one that replaces it could not be written."""
        if self._has_failed:
            self._replaced.append(path)
        else:
            super().remove_checkpoint(path)


def use_durable_checkpoints(trainer: Trainer) -> None:
    """Put ``DurableCheckpointIO`` in place of Lightning's plain one, and of no other."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # torch's writer complains of positions after a write has failed
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
