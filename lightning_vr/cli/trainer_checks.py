"""Settings of the trainer that Lightning accepts, but ignores, changes or divides by."""

import math
import os
import re
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_vr.lifecycle.configuration import imported

_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
_DURATION = re.compile(r"\d+:\d\d?:\d\d?:\d\d?")
_LIMITS = {
    "fit": ("limit_train_batches", "max_epochs", "max_steps"),
    "audit": ("limit_train_batches",),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}
"""Settings of which 0 means that a subcommand does nothing at all."""

_CALLBACKS: dict[type, dict[str, tuple[float, float]]] = {
    EMAWeightAveraging: {
        "decay": (0, 1),
        "update_every_n_steps": (1, math.inf),
        "update_starting_at_step": (0, math.inf),
        "update_starting_at_epoch": (0, math.inf),
    },
    ModelCheckpoint: {"save_top_k": (-1, math.inf)},
}
"""Smallest and largest values of settings that callbacks of Lightning take as they are."""

_PROCESSES_OF_A_CORE = 4
"""To try out several processes on few cores is reasonable; a hundred would exhaust the memory."""


def check_trainer_settings(settings: Any, subcommand: str) -> None:
    """Raise if a setting would end in a traceback, or in another run than was asked for.

    Args:
        settings: The settings of the section ``trainer``.
        subcommand: What the trainer is for.

    Raises:
        ValueError: With the name of the setting.
    """
    _check_numbers(settings, subcommand)
    _check_batches(settings)
    for callback in _listed(settings.callbacks):
        _check_callback(callback)
    time = settings.get("max_time")
    if isinstance(time, str) and not (_DURATION.fullmatch(time) and re.search("[1-9]", time)):
        raise ValueError(
            f"`trainer.max_time` must be a duration above 0 as days, hours, minutes and seconds, "
            f"got {time}: use a form such as 00:01:30:00."
        )
    if settings.accelerator == "cpu" and str(settings.precision) in ("16", "16-mixed"):
        raise ValueError(
            f"`trainer.precision` must be one that a CPU has, got {settings.precision}: use "
            f"bf16-mixed."
        )
    if settings.barebones and subcommand == "fit":
        raise ValueError(
            "`trainer.barebones` must be false, as it leaves out logs and checkpoints, got true: "
            "leave it out."
        )


def check_processes(trainer: Trainer) -> None:
    """Raise if a trainer would wait for nodes that cannot find it, or start far too many processes.

    Args:
        trainer: A trainer that has not started yet.

    Raises:
        ValueError: With the name of the setting.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment):
        missing = _missing_variables()
        if missing:
            raise ValueError(
                f"`trainer.num_nodes` must be 1 where nothing says how the nodes meet, got "
                f"{trainer.num_nodes} without {' and '.join(missing)}: start the command on each "
                f"node by torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there."
            )
    cores = os.cpu_count() or 1
    most = _PROCESSES_OF_A_CORE * cores
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > most:
        raise ValueError(
            f"`trainer.devices` must be at most {most} processes on the {cores} cores of this CPU, "
            f"got {trainer.num_devices}: use {cores}."
        )


def _missing_variables() -> list[str]:
    """Return what Lightning needs in the environment of a node, but would make up itself."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK"))
    needed = ["MASTER_PORT"] if node == "0" else ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in os.environ]
    return missing if node is not None else [*missing, "NODE_RANK"]


def _check_numbers(settings: Any, subcommand: str) -> None:
    for name, least in _LEAST.items():
        value = settings.get(name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(
                f"`trainer.{name}` must be at least {least} and finite, got {value}: use "
                f"{max(1, least)}."
            )
    if settings.get("val_check_interval") == 0:
        raise ValueError(
            "`trainer.val_check_interval` must be positive, got 0: use limit_val_batches=0 for no "
            "validation."
        )
    for name in _LIMITS.get(subcommand, ()):
        if settings.get(name) == 0:
            raise ValueError(
                f"`trainer.{name}` must not be 0, with which `{subcommand}` would do nothing, got "
                f"0: use 1 or more, or leave it out."
            )
    for first, last in (("min_steps", "max_steps"), ("min_epochs", "max_epochs")):
        low, high = settings.get(first), settings.get(last)
        if low is not None and high is not None and -1 < high < low:
            raise ValueError(
                f"`trainer.{first}` must be at most `trainer.{last}`, which is {high}, got {low}: "
                f"use a smaller one, or leave it out."
            )


def _check_batches(settings: Any) -> None:
    names = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")
    for name in (*names, "limit_predict_batches", "val_check_interval"):
        value = settings.get(name)
        if isinstance(value, float) and not (0 <= value <= 1 or _is_whole(value)):
            raise ValueError(
                f"`trainer.{name}` must be a whole number of batches, or a fraction of them "
                f"between 0 and 1, got {value}: use one of these."
            )


def _is_whole(value: float) -> bool:
    return value >= 0 and value.is_integer()


def _check_callback(callback: Any) -> None:
    kind = imported(callback.class_path) if isinstance(callback, Namespace) else None
    given = callback.get("init_args") if isinstance(callback, Namespace) else None
    for base, bounds in _CALLBACKS.items():
        if not (given and isinstance(kind, type) and issubclass(kind, base)):
            continue
        for name, (least, most) in bounds.items():
            value = given.get(name)
            if value is not None and not least <= value <= most:
                allowed = f"between {least} and {most}" if most < math.inf else f"at least {least}"
                raise ValueError(
                    f"`trainer.callbacks.{name}` of {kind.__name__} must be {allowed}, got "
                    f"{value}: use such a number."
                )


def _listed(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting]
