"""The file that ``--ckpt_path`` names: with ``last`` the newest checkpoint of all runs."""

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_vr.lifecycle.atomic_files import recovered
from lightning_vr.lifecycle.configuration import imported


def checkpoint_path(settings: Namespace) -> str | None:
    """Return the file of ``ckpt_path``, or None if not given or left for Lightning to find.

    Args:
        settings: The settings of a subcommand.

    Raises:
        ValueError: If there is no such file.
    """
    path = settings.get("ckpt_path")  # `cache` has none
    if path == "last":
        return str(last_checkpoint(settings.trainer))
    if path in (None, "best", "hpc") or str(path).startswith("registry"):
        return None
    if "://" not in str(path):
        path = os.path.expanduser(path)
        if not recovered(Path(path)).exists():
            raise ValueError(
                f"`ckpt_path` must be a checkpoint file or 'last', but there is no file {path}: "
                f"correct the path."
            )
    return str(path)


def last_checkpoint(trainer: Namespace) -> Path:
    """Return the newest ``last`` checkpoint of all runs that share the configured folders.

    Args:
        trainer: The settings of the section ``trainer``.

    Raises:
        ValueError: If there is none, or if the newest one is a broken link.
    """
    folder = _runs_folder(trainer)
    own = _checkpoint_folders(trainer)
    folders = [each for up in ("", "*/", "*/*/") for each in folder.glob(f"{up}checkpoints")] + own
    for each in folders:
        recovered(each / "last.ckpt")
    found = [path for each in folders for path in each.glob("last*.ckpt")]
    if not found:
        others = "".join(f" and no last.ckpt in {each}" for each in own)
        raise ValueError(
            f"`ckpt_path` must be an existing checkpoint, got 'last' with no checkpoints/last.ckpt "
            f"in {folder}{others}: name the file, or train with a ModelCheckpoint(save_last=True)."
        )
    newest = max(found, key=lambda path: path.lstat().st_mtime)
    if not newest.exists():
        raise ValueError(
            f"`ckpt_path` must be an existing checkpoint, got 'last', but {newest} is a link to "
            f"{newest.readlink()}, which does not exist: name the file."
        )
    return newest


def _runs_folder(trainer: Namespace) -> Path:
    """Return the folder in which Lightning makes one for each run, as the first logger says."""
    root = Path(trainer.default_root_dir or ".").expanduser()
    loggers = [each for each in _listed(trainer.logger) if isinstance(each, Namespace)]
    if not loggers:
        return root
    settings = _arguments(loggers[0])
    name = settings.get("name")
    if _is_a(loggers[0], WandbLogger):
        # its folders are named for the project, and `name` is only the title of a run
        name = settings.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
    return Path(settings.get("save_dir") or settings.get("dir") or root) / (name or "")


def _checkpoint_folders(trainer: Namespace) -> list[Path]:
    """Return the folders that are configured for ModelCheckpoints, whatever the logger."""
    checkpoints = [each for each in _listed(trainer.callbacks) if _is_a(each, ModelCheckpoint)]
    given = [_arguments(each).get("dirpath") for each in checkpoints]
    return [Path(each).expanduser() for each in given if each]


def _listed(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting]


def _arguments(setting: Namespace) -> dict[str, Any]:
    given = setting.get("init_args")
    return given.as_dict() if given else {}


def _is_a(setting: Any, kind: type) -> bool:
    found = imported(setting.class_path) if isinstance(setting, Namespace) else None
    return isinstance(found, type) and issubclass(found, kind)
