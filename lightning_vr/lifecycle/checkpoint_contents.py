"""Whether a checkpoint holds what it must, before anything is restored from it.

Lightning takes much of a checkpoint on trust: an error in the middle of a restore names neither the
file nor the fix, and what is missing from the state of its loops is left out silently.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_vr.lifecycle.checkpoint_errors import damaged, shown
from lightning_vr.lifecycle.own_state import (
    check_own_state,
    check_own_state_of_fit,
    has_names,
    is_count,
)
from lightning_vr.lifecycle.similar_state import check_similar

_WEIGHTS_OF_TRAINING = "current_model_state"
_TRAINING = {
    "loops": (dict, "the state of its loops"),
    "callbacks": (dict, "the states of callbacks"),
    "optimizer_states": (list, "the states of optimizers"),
    "lr_schedulers": (list, "the states of learning-rate schedules"),
}
_SAVED_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
_SHAPED_AS_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def check_contents(checkpoint: Any, path: Any) -> None:
    """Raise if a file holds no weights of a module, or no settings that can be read.

    Raises:
        ValueError: With what it holds instead, and what to do.
    """
    if not isinstance(checkpoint, dict):
        raise _no_checkpoint(path, f"which holds a {type(checkpoint).__name__}")
    if "state_dict" not in checkpoint:
        values = checkpoint.values()
        is_weights = len(values) > 0 and all(isinstance(x, Tensor) for x in values)
        found = "which holds weights alone" if is_weights else "which has no `state_dict`"
        raise _no_checkpoint(path, found)
    for name in ("state_dict", _WEIGHTS_OF_TRAINING):
        if name in checkpoint:
            _check_weights(name, checkpoint[name], path)
    hyperparameters = checkpoint.get("hyper_parameters", {})
    if not has_names(hyperparameters):
        raise damaged("hyper_parameters", "settings by name", hyperparameters, path)
    check_own_state(checkpoint, path)


def check_version(checkpoint: dict[str, Any], path: Any) -> None:
    """Raise if a checkpoint does not say which Lightning has written it.

    Raises:
        ValueError: If so.
    """
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.match(r"\d+\.\d+\.\d+", version):
        raise damaged("pytorch-lightning_version", "a version", version, path)


def check_training_state(checkpoint: dict[str, Any], path: Any) -> None:
    """Raise if a checkpoint lacks what a fit goes on from.

    Raises:
        ValueError: With what is missing, or of another type.
    """
    if "optimizer_states" not in checkpoint and "callbacks" not in checkpoint:
        raise ValueError(
            f"`ckpt_path` must be a checkpoint with the state of training, got {path}, which holds "
            f"weights alone: use one that was saved without save_weights_only, or train from the "
            f"start."
        )
    for name in ("epoch", "global_step"):
        if not is_count(checkpoint.get(name)):
            raise damaged(name, "a number of 0 or more", checkpoint.get(name), path)
    for name, (kind, what) in _TRAINING.items():
        if not isinstance(checkpoint.get(name), kind):
            raise damaged(name, what, checkpoint.get(name), path)
    check_own_state_of_fit(checkpoint, path)
    if not has_names(checkpoint["callbacks"]):
        raise damaged("callbacks", "states by name", checkpoint["callbacks"], path)
    for state in checkpoint["callbacks"].values():
        _check_saved_paths(state, path)
    for name in ("optimizer_states", "lr_schedulers"):
        for state in checkpoint[name]:
            if not has_names(state):
                raise damaged(name, "a list of states", state, path)


def check_loops(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Raise if the loops of a trainer lack a part of their state in a checkpoint.

    Raises:
        ValueError: With the part.
    """
    saved = checkpoint["loops"].get("fit_loop")
    _check_like(saved, trainer.fit_loop.state_dict(), "loops.fit_loop", trainer.ckpt_path)


def check_optimizer_states(trainer: Trainer) -> None:
    """Raise if what a trainer is about to restore are not the states of its optimizers.

    Lightning would take fewer states than there are optimizers, and moments of any shape.

    Raises:
        ValueError: With the state.
    """
    # seen in Lightning 2.6; it is empty if nothing is restored
    checkpoint = trainer._checkpoint_connector._loaded_checkpoint
    if not checkpoint:
        return
    path = trainer.ckpt_path
    made: dict[str, list[Any]] = {
        "optimizer_states": trainer.optimizers,
        "lr_schedulers": trainer.lr_scheduler_configs,
    }
    for name, each in made.items():
        if len(checkpoint[name]) != len(each):
            raise _of_another(name, f"{len(each)} states", str(len(checkpoint[name])), path)
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        _check_optimizer(optimizer, saved, path)
    for config, saved in zip(
        trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True
    ):
        _check_scheduler(saved, config.scheduler.state_dict(), path)


def _no_checkpoint(path: Any, found: str) -> ValueError:
    return ValueError(
        f"`ckpt_path` must be a checkpoint of Lightning, got {path}, {found}: name a file that a "
        f"ModelCheckpoint wrote."
    )


def _of_another(name: str, allowed: str, got: str, path: Any) -> ValueError:
    return ValueError(
        f"`{name}` in the checkpoint {path} must be {allowed} for this module and optimizer, got "
        f"{got}: configure what was trained, or train from the start without ckpt_path."
    )


def _check_weights(name: str, weights: Any, path: Any) -> None:
    if not has_names(weights):
        raise damaged(name, "weights by name", weights, path)
    for key, value in weights.items():
        if key.rpartition(".")[2] == "_extra_state":
            continue
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise damaged(f"{name}.{key}", "a dense tensor", value, path)


def _check_saved_paths(state: Any, path: Any) -> None:
    """Raise if what a ModelCheckpoint takes for paths of its files are none."""
    if not isinstance(state, Mapping):
        return
    best = state.get("best_k_models") or {}
    found = [state.get(name) for name in _SAVED_PATHS]
    for each in [*found, *(best if isinstance(best, Mapping) else [best])]:
        if not isinstance(each, (str, type(None))):
            raise damaged("callbacks.best_k_models", "paths of checkpoints", each, path)


def _check_like(saved: Any, own: Any, name: str, path: Any) -> None:
    """Raise if a saved state lacks a part that the state of a new loop has."""
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            raise damaged(name, "the state of a loop", saved, path)
        for key, value in own.items():
            _check_like(saved.get(key), value, f"{name}.{key}", path)
    elif isinstance(own, bool):
        if not isinstance(saved, bool):
            raise damaged(name, "true or false", saved, path)
    elif isinstance(own, int) and not is_count(saved):
        raise damaged(name, "a number of 0 or more", saved, path)


def _check_scheduler(saved: Any, own: dict[str, Any], path: Any) -> None:
    """Raise if the state of a schedule lacks its count of steps, or has values of another kind."""
    if "last_epoch" in own and not is_count(saved.get("last_epoch")):
        name = "lr_schedulers.last_epoch"
        raise damaged(name, "a number of 0 or more", saved.get("last_epoch"), path)
    check_similar(saved, own, "lr_schedulers", path)


def _check_optimizer(optimizer: Optimizer, saved: Any, path: Any) -> None:
    name = "optimizer_states"
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(states, dict) or not isinstance(groups, list):
        raise damaged(name, "states of parameters", saved, path)
    own = optimizer.param_groups
    numbers = {number for group in groups for number in _parameters(group)}
    if not states.keys() <= numbers:
        raise damaged(f"{name}.state", "states of the parameters in its groups", states, path)
    sizes = [len(_parameters(group)) for group in groups]
    if sizes != [len(group["params"]) for group in own]:
        expected = [len(group["params"]) for group in own]
        raise _of_another(name, f"of {expected} parameters", str(sizes), path)
    for group, made in zip(groups, own, strict=True):
        for key, value in made.items():
            if not _is_like(group.get(key), value):
                got = shown(group.get(key))
                raise _of_another(f"{name}.{key}", f"as {value!r} is", got, path)
        for number, parameter in zip(group["params"], made["params"], strict=True):
            _check_moments(states.get(number, {}), parameter, path)


def _is_like(saved: Any, own: Any) -> bool:
    """Return whether a saved option is a number where the optimizer's own is one."""
    if isinstance(own, tuple):
        is_list = isinstance(saved, (list, tuple)) and len(saved) == len(own)
        return is_list and all(map(_is_like, saved, own))
    if not isinstance(own, float):
        return True
    if isinstance(saved, Tensor):
        return saved.numel() == 1
    return isinstance(saved, (int, float)) and abs(saved) <= torch.finfo(torch.float32).max


def _parameters(group: Any) -> list[int]:
    """Return the numbers of the parameters of a saved group, none if it does not say."""
    found = group.get("params") if isinstance(group, dict) else None
    return [x for x in found if is_count(x)] if isinstance(found, list) else []


def _check_moments(state: Any, parameter: Tensor, path: Any) -> None:
    if not isinstance(state, dict):
        raise damaged("optimizer_states.state", "states of parameters", state, path)
    for key in _SHAPED_AS_PARAMETERS:
        value = state.get(key)
        if value is None:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else shown(value)
        if shape != tuple(parameter.shape):
            expected = f"of shape {tuple(parameter.shape)}"
            raise _of_another(f"optimizer_states.{key}", expected, str(shape), path)
