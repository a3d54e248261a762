"""Checkpoints that are written whole or not at all, and a full disk that loses none.

A checkpoint is written to a file beside its path, flushed to the disk and then renamed, which is
atomic on one file system: a process that is killed at any moment leaves the old file or the new
one. If the disk is full the run goes on with a warning, and the checkpoint that the new one would
have replaced stays until a later one is written.

Weights that are not finite are not written either, as they would take the place of good ones.

If the last write to a folder has failed, the end of the run says so with an error, and what was
trained is written elsewhere: to the folder itself, if it has room by then, to the trainer's
``default_root_dir`` or to the system's folder for temporary files.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.core.distributed import SynchronizedError, gather_objects, rank, world_size
from lightning_vr.lifecycle.atomic_files import (
    remove_abandoned,
    remove_at_once,
    replace_link,
    replacing,
)
from lightning_vr.lifecycle.loggers import is_training, run_folder
from lightning_vr.lifecycle.nonfinite_cause import first_broken_weight
from lightning_vr.lifecycle.sharded_checkpoints import gathered, is_sharded_folder, load_folder
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of


class UnwrittenCheckpointError(SynchronizedError):
    """A run is over whose last checkpoint could not be written."""

    exit_status = 1
    """How the command line ends: no setting need be wrong."""


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
        self._linked: list[Any] = []
        # of each folder whose last write has failed: the checkpoint and the reason
        self._unwritten: dict[Path, tuple[str, str]] = {}
        self._is_over = False
        self._written: set[str] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, or warn that it could not be written."""
        trainer, broken = self.trainer, None
        if trainer is not None and is_training(trainer):
            broken = first_broken_weight(trainer.lightning_module)
        self.attempt(lambda: self.put(checkpoint, path, storage_options), path, broken)

    def put(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None) -> None:
        """Write a checkpoint."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            _write(checkpoint, Path(path))

    def attempt(self, write: Callable[[], None], path: Any, broken: str | None) -> None:
        """Write a checkpoint, or warn that it could not be written.

        Args:
            write: Writes it; may raise ``OSError``.
            path: Where to.
            broken: Name of a weight that is not finite, if there is one: then it is not written.
        """
        ending = sys.exc_info()[1]
        try:
            if broken is not None:
                raise OSError(f"the weight `{broken}` is not finite")
            write()
        except OSError as error:
            if self.trainer is not None and not is_training(self.trainer):
                raise
            self._failed = str(path)
            if not self._is_over:
                self._unwritten[Path(path).parent] = str(path), str(error)
            rank_zero_warn(
                f"The checkpoint {path} could not be written ({error}): "
                f"{'the run ends' if ending else 'training goes on'}, and earlier checkpoints are "
                f"kept."
            )
            return
        self._failed = None
        self._unwritten.pop(Path(path).parent, None)
        self._written.add(_place(path))
        self._remove_kept_for(path)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without the objects in it that could run code, unless asked to."""
        # Lightning reads any object of a remote file if it is not told
        weights_only = True if weights_only is None else weights_only
        if is_sharded_folder(path):
            return load_folder(Path(path))
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
        if self.trainer is not None and _is_linked(path, self.trainer):
            self._linked.append(path)
            return
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            remove_at_once(Path(path))
        self._remove_kept_for(path)

    def remove_unlinked(self) -> None:
        """Remove checkpoints that stayed as the link to the last one led to them."""
        linked, self._linked = self._linked, []
        for path in linked:
            self.remove_checkpoint(path)

    def teardown(self) -> None:
        """Save elsewhere what an error or a signal ends, if the last checkpoint was not written."""
        # ranks that end together and those that fail alone are not told apart here
        is_alone = self._unwritten and world_size() == 1
        if self.trainer is None or not self.trainer.interrupted or not is_alone:
            return
        # of weights that are not finite the error or a warning has told
        if first_broken_weight(self.trainer.lightning_module) is None:
            rank_zero_warn(str(self._save_elsewhere(self.trainer)))

    def begin(self, trainer: Trainer) -> None:
        """Forget an earlier fit."""
        self.trainer, self._failed, self._is_over = trainer, None, False
        self._kept, self._linked, self._unwritten = [], [], {}

    def finish(self, trainer: Trainer) -> None:
        """Raise if the last checkpoint was not written; all ranks call it at the end of a fit.

        Raises:
            UnwrittenCheckpointError: With the reason, and where the weights are instead.
        """
        self._is_over = True
        if any(gather_objects(bool(self._unwritten))):
            message = next(filter(None, gather_objects(self._save_elsewhere(trainer))))
            raise UnwrittenCheckpointError(message)

    def _save_elsewhere(self, trainer: Trainer) -> str | None:
        """Write what was trained where there is room, and return what to say; all ranks call it."""
        unwritten, self._unwritten = self._unwritten, {}
        checkpoint = gathered(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
        is_broken = any(gather_objects(first_broken_weight(trainer.lightning_module)))
        if not unwritten or rank() > 0:
            return None
        saved = None
        if not is_broken:
            folders = [folder for folder, (path, _) in unwritten.items() if "://" not in path]
            folders += [Path(trainer.default_root_dir), Path(tempfile.gettempdir())]
            saved = _write_to_first(checkpoint, folders)
        (path, reason), *_ = unwritten.values()
        where = "what was trained since the checkpoint before it is lost."
        if saved is not None:
            where = f"what was trained is in {saved}: move it to a safe place."
        return f"The last checkpoint, {path}, could not be written ({reason}): {where}"

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


def begin_checkpoints(trainer: Trainer) -> None:
    """Begin a fit, and remove what killed processes have left; all ranks call it."""
    use_durable_checkpoints(trainer)
    if isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
        trainer.strategy.checkpoint_io.begin(trainer)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            _link_whole_files(callback)
    folder = run_folder(trainer)
    if trainer.is_global_zero:
        for each in _folders(trainer, folder):
            remove_abandoned(each)


def finish_checkpoints(trainer: Trainer) -> None:
    """Raise if the last checkpoint of a fit was not written; all ranks call it at its end."""
    if isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
        trainer.strategy.checkpoint_io.finish(trainer)


def _link_whole_files(callback: ModelCheckpoint) -> None:
    """Let ``save_last="link"`` lead to a whole file at each moment, written before or now.

    ``_link_checkpoint`` is as seen in Lightning 2.6.
    """
    link = type(callback)._link_checkpoint

    def link_if_written(trainer: Trainer, filepath: str, linkpath: str) -> None:
        is_first, io = trainer.is_global_zero, trainer.strategy.checkpoint_io
        is_due = not is_first or os.path.exists(filepath)
        if is_first and is_due and "://" not in linkpath:
            is_due = not replace_link(Path(linkpath), Path(filepath))
        # to itself it links nothing, and the ranks still meet
        link(trainer, filepath if is_due else linkpath, linkpath)
        if isinstance(io, DurableCheckpointIO):
            io.remove_unlinked()

    callback._link_checkpoint = link_if_written  # type: ignore[method-assign]


def _folders(trainer: Trainer, folder: Path) -> set[Path]:
    """Return where this run or an earlier one may have been killed while it wrote."""
    found = {folder}
    if folder.name.startswith("version_"):
        found |= set(folder.parent.glob("version_*"))
    found |= {each / name for each in found for name in ("checkpoints", "samples")}
    savers = [each for each in callbacks_of(trainer) if isinstance(each, ModelCheckpoint)]
    paths = [each.dirpath for each in savers if each.dirpath is not None]
    if trainer.ckpt_path is not None:
        paths.append(str(Path(trainer.ckpt_path).parent))
    return found | {Path(each) for each in paths if "://" not in str(each)}


def _write_to_first(checkpoint: dict[str, Any], folders: list[Path]) -> Path | None:
    """Write a checkpoint to the first folder that takes it, and return its path."""
    for folder in folders:
        stem = f"unsaved-step={checkpoint['global_step']}"
        names = (f"{stem}-v{number}.ckpt" if number else f"{stem}.ckpt" for number in count())
        with suppress(OSError):
            path = next(folder / name for name in names if not (folder / name).exists())
            _write(checkpoint, path)
            return path
    return None


def _is_linked(path: Any, trainer: Trainer) -> bool:
    """Return whether the link to the last checkpoint, which is about to move, leads to a path."""
    callbacks = trainer.checkpoint_callbacks
    if "://" in str(path) or all(getattr(x, "save_last", None) != "link" for x in callbacks):
        return False
    # a ModelCheckpoint of a run that was killed early has lost the name of its link
    beside = Path(path).parent.glob("*.ckpt")
    return any(each.is_symlink() and _place(each) == _place(path) for each in beside)


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
