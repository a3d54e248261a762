"""What ``--ckpt_path`` names, and what of it the settings agree with."""

import inspect
import os
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import WandbLogger

from lightning_vr.lifecycle.checkpoints import HYPERPARAMETERS, STATE
from lightning_vr.lifecycle.configuration import describe, imported
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.schedules import EDM, Schedule
from lightning_vr.training.module import DiffusionModule

_OPTIMIZATION = {"optimizer": OptimizerCallable, "lr_scheduler": LRSchedulerCallable | None}
_NETWORK = {
    "schedule": Schedule,
    "prediction": PredictionType,
    "sigma_data": float,
    "num_classes": int | None,
}
"""What a network is trained for: with another one its weights mean nothing."""


def last_checkpoint(trainer: Namespace) -> Path:
    """Return the newest ``last`` checkpoint of all runs that share the configured folders."""
    folder = _runs_folder(trainer)
    own = _checkpoint_folders(trainer)
    found = [
        path for up in ("", "*/", "*/*/") for path in folder.glob(f"{up}checkpoints/last*.ckpt")
    ]
    found += [path for each in own for path in each.glob("last*.ckpt")]
    if not found:
        others = "".join(f" and no last.ckpt in {each}" for each in own)
        raise ValueError(
            f"Argument `ckpt_path` is 'last', but there is no checkpoints/last.ckpt in "
            f"{folder}{others}: name the file, or train with a ModelCheckpoint(save_last=True)."
        )
    newest = max(found, key=lambda path: path.lstat().st_mtime)
    if not newest.exists():
        raise ValueError(
            f"Argument `ckpt_path` is 'last', but {newest} is a link to {newest.readlink()}, which "
            f"is not there: name the file."
        )
    return newest


def _runs_folder(trainer: Namespace) -> Path:
    """Return where Lightning makes a folder for each run, as the first logger has it."""
    root = Path(trainer.default_root_dir or ".").expanduser()
    loggers = [each for each in _listed(trainer.logger) if isinstance(each, Namespace)]
    if not loggers:
        return root
    settings = _arguments(loggers[0])
    name = settings.get("name")
    if _is_a(loggers[0], WandbLogger):
        # runs lie by their project there, and `name` is what a run is shown as
        name = settings.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
    return Path(settings.get("save_dir") or settings.get("dir") or root) / (name or "")


def _checkpoint_folders(trainer: Namespace) -> list[Path]:
    """Return the folders that ModelCheckpoints are told to write to, whatever the logger."""
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


def model_settings(checkpoint: dict[str, Any], path: Any) -> dict[str, Any]:
    """Return what rebuilds the module of a checkpoint, as the command line takes a module.

    Partials of functions, which it does not take, are left out.

    Raises:
        ValueError: If the checkpoint does not say.
    """
    described = dict(checkpoint.get(HYPERPARAMETERS, {}))
    class_path = described.pop("_class_path", None)
    described.pop("_instantiator", None)
    if class_path is None:
        raise ValueError(
            f"The checkpoint {path} does not say how to rebuild its module: configure it."
        )
    for name in _OPTIMIZATION.keys() & described.keys():
        if _parsed(_OPTIMIZATION[name], described[name]) is None:
            del described[name]
    return {"class_path": class_path, "init_args": described}


def changed_optimization(
    model: dict[str, Any], checkpoint: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Return (name, configured, saved) of optimizer settings that differ from a checkpoint's.

    Resuming restores their state, hyperparameters included, so that no change takes effect.
    """
    return _changes(model, checkpoint, _OPTIMIZATION)


def changed_network(
    model: dict[str, Any], checkpoint: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Return (name, configured, saved) of what a checkpoint's weights were not trained for."""
    return _changes(model, checkpoint, _NETWORK)


def _changes(
    model: dict[str, Any], checkpoint: dict[str, Any], types: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    saved = dict.fromkeys(checkpoint.get(STATE, {}).get("objects", []), "an object of Python's")
    saved |= checkpoint.get(HYPERPARAMETERS, {})
    changes = []
    for name, kind in types.items():
        if name not in model["init_args"]:
            continue
        default = describe(inspect.signature(DiffusionModule).parameters[name].default)
        if kind is Schedule:
            default = {"class_path": f"{EDM.__module__}.{EDM.__qualname__}"}
        now, then = (
            _flat(_parsed(kind, given) or given, f"model.{name}")
            for given in (model["init_args"][name] or default, saved.get(name) or default)
        )
        changed = [key for key in now | then if now.get(key) != then.get(key)]
        # of another class all else may differ
        changed = [f"model.{name}"] if f"model.{name}" in changed else changed
        changes += [(key, now.get(key), then.get(key)) for key in changed]
    return changes


def _parsed(kind: Any, given: Any) -> Any:
    """Return settings with all defaults, or None if they are none of their kind."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--given", type=kind)
    try:
        return parser.parse_object({"given": given}).as_dict()["given"]
    except ArgumentError:
        return None


def _flat(settings: Any, name: str) -> dict[str, Any]:
    """Return ``a.b: value`` for nested settings; a class stands under the name of its settings."""
    if not isinstance(settings, dict):
        return {name: settings}
    parts = {}
    for key, value in settings.items():
        if key == "class_path":
            kind = imported(value)
            parts[name] = value if kind is None else f"{kind.__module__}.{kind.__qualname__}"
        else:
            parts.update(_flat(value, name if key == "init_args" else f"{name}.{key}"))
    return parts
