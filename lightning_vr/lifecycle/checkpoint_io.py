"""Checkpoints that are written whole or not at all, and a full disk that does not end a run.

A checkpoint is written to a file beside its path, flushed to the disk and then renamed, which is
atomic on one file system: a process that is killed at any moment leaves the old file or the new
one. If the disk is full the run goes on with a warning, and the checkpoint that the new one would
have replaced stays until a later one is written.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import is_training


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and warns where the disk is full.

    A ``ResumableModule`` puts it in place of Lightning's plain one; for other modules give it to
    the trainer: ``Trainer(plugins=[DurableCheckpointIO()])``.
    """

    def __init__(self) -> None:
        # if it is known, a checkpoint that is saved outside of training raises as usual
        self.trainer: Trainer | None = None
        # the last checkpoint, if it could not be written, and the files kept in place of such ones
        self._failed: str | None = None
        self._kept: list[tuple[str, Any]] = []
        self._written: set[str] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, or warn that it could not be written."""
        try:
            if "://" in str(path) or storage_options is not None:
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                _write(checkpoint, Path(path))
        except OSError as error:
            if self.trainer is not None and not is_training(self.trainer):
                raise
            self._failed = str(path)
            rank_zero_warn(
                f"The checkpoint {path} could not be written ({error}): training goes on, and "
                f"earlier checkpoints are kept."
            )
            return
        self._failed = None
        self._written.add(_place(path))
        self._remove_kept_for(path)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without the objects in it that could run code, unless asked to."""
        # Lightning reads any object of a remote file if it is not told
        weights_only = True if weights_only is None else weights_only
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, unless its replacement could not be written.

        The state of a ``ModelCheckpoint`` names the files that it removes, and may come from the
        checkpoint of a stranger: what is not in its folder stays.
        """
        if not self._is_own(path):
            rank_zero_warn(
                f"The checkpoint {path} is not removed: this run has not written it, and it is in "
                f"no folder of a ModelCheckpoint."
            )
            return
        if self._failed is not None:
            self._kept.append((self._failed, path))
            return
        super().remove_checkpoint(path)
        self._remove_kept_for(path)

    def _is_own(self, path: Any) -> bool:
        """Return whether a run may remove a file: one of its own, or in a folder of its own."""
        if self.trainer is None or _place(path) in self._written:
            return True
        callbacks = self.trainer.checkpoint_callbacks
        folders = [getattr(callback, "dirpath", None) for callback in callbacks]
        return any(f"{_place(path)}".startswith(f"{_place(each)}/") for each in folders if each)

    def _remove_kept_for(self, path: Any) -> None:
        """Remove files that were kept because ``path`` could not be written: now it is."""
        replaced = [old for failed, old in self._kept if failed == str(path)]
        self._kept = [pair for pair in self._kept if pair[0] != str(path)]
        for old in replaced:
            self.remove_checkpoint(old)


def use_durable_checkpoints(trainer: Trainer) -> None:
    """Put ``DurableCheckpointIO`` in place of Lightning's plain one, and of no other."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
    if isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
        trainer.strategy.checkpoint_io.trainer = trainer


def _place(path: Any) -> str:
    """Return where a path leads, with neither ``..`` nor links in it."""
    scheme, separator, rest = str(path).rpartition("://")
    return f"{scheme}{separator}{os.path.normpath(rest)}" if scheme else os.path.realpath(rest)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with replacing(path) as file:
            torch.save(checkpoint, file)
    except BaseException as error:
        # torch's writer raises an error of its own after a write has failed
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
