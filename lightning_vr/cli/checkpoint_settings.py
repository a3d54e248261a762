"""The settings that a checkpoint was written with, beside those that are configured."""

import inspect
from typing import Any, NamedTuple

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.lifecycle.configuration import describe, imported
from lightning_vr.lifecycle.own_state import STATE
from lightning_vr.lifecycle.rebuilding import SavedArguments, class_to_load
from lightning_vr.lifecycle.trust import Trust
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.schedules import EDM, Schedule
from lightning_vr.training.sigma_data import SigmaData

_OPTIMIZATION = {
    "optimizer": OptimizerCallable,
    "fake_optimizer": OptimizerCallable | None,
    "lr_scheduler": LRSchedulerCallable | None,
}
_NETWORK = {
    "schedule": Schedule,
    "prediction": PredictionType,
    "sigma_data": SigmaData,
    "num_classes": int | None,
}
"""What a network is trained for: with another one its weights mean nothing."""


class Change(NamedTuple):
    """A setting that differs from a checkpoint's.

    Attributes:
        name: The setting.
        configured: Its value now.
        saved: Its value in the checkpoint.
    """

    name: str
    configured: Any
    saved: Any


def check_changes(settings: Namespace, checkpoint: dict[str, Any], *, is_fit: bool) -> None:
    """Warn of settings that the weights of a checkpoint were not trained with.

    Args:
        settings: The settings of a command, with ``ckpt_path``.
        checkpoint: The checkpoint.
        is_fit: Whether its training state is restored, too.

    Raises:
        ValueError: If the training state does not go with the settings.
    """
    model, trust = settings.model.as_dict(), Trust(settings.ckpt_path, settings.trust)
    for name, configured, saved in changed_network(model, checkpoint, trust):
        rank_zero_warn(
            f"Setting `{name}` is {configured}, but {saved} in {settings.ckpt_path}, whose weights "
            f"were trained with it: unless you mean this, use the config.yaml of their run."
        )
    if not is_fit:
        return
    changes = changed_optimization(model, checkpoint, trust)
    seed = saved_seed(checkpoint)
    if seed is not None and settings.seed_everything != seed:
        changes.append(Change("seed_everything", settings.seed_everything, seed))
    if changes:
        name, configured, saved = changes[0]
        raise ValueError(
            f"`{name}` must be {saved}, as in {settings.ckpt_path}, whose training state `fit` "
            f"restores, got {configured}: leave it out, or train from the start without "
            f"--ckpt_path."
        )


def saved_seed(checkpoint: dict[str, Any]) -> int | None:
    """Return the seed of a checkpoint's run, or None if the command line does not take it."""
    seed: int | None = checkpoint.get(STATE, {}).get("seed")
    return seed if seed is not None and seed < 2**32 else None


def model_settings(checkpoint: dict[str, Any], base: Any, trust: Trust) -> dict[str, Any]:
    """Return what rebuilds the module of a checkpoint, as the command line takes a module.

    Partials of functions, which the command line does not take, are left out.

    Args:
        checkpoint: The checkpoint.
        base: The class that the module is to be of.
        trust: What may be built from it.

    Raises:
        ValueError: If the checkpoint does not say, or names what may not be built.
    """
    saved = SavedArguments.of(checkpoint)
    if saved.class_path is None:
        raise ValueError(
            f"`model` must be configured, as the checkpoint {trust.path} does not say how to "
            f"rebuild its module: give a network, as in --model.network ResidualMLP."
        )
    kind = class_to_load(base, saved.class_path, trust)
    saved.check_complete(trust.path, given=_OPTIMIZATION)
    arguments = {
        name: value
        for name, value in saved.checked(kind, trust, saved.described).items()
        if name not in _OPTIMIZATION or _parsed(_OPTIMIZATION[name], value) is not None
    }
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def changed_optimization(
    model: dict[str, Any], checkpoint: dict[str, Any], trust: Trust
) -> list[Change]:
    """Return the optimizer's settings that differ from a checkpoint's.

    Resuming restores the optimizer with its hyperparameters, so that no change takes effect.
    """
    return _changes(model, checkpoint, _OPTIMIZATION, trust)


def changed_network(
    model: dict[str, Any], checkpoint: dict[str, Any], trust: Trust
) -> list[Change]:
    """Return the settings that the weights of a checkpoint were not trained for."""
    return _changes(model, checkpoint, _NETWORK, trust)


def _changes(
    model: dict[str, Any], checkpoint: dict[str, Any], types: dict[str, Any], trust: Trust
) -> list[Change]:
    arguments, kind_of_model = SavedArguments.of(checkpoint), imported(model["class_path"])
    described = arguments.checked(kind_of_model, trust, types)
    saved = dict.fromkeys(arguments.objects, "an object of Python's") | described
    changes = []
    for name, kind in types.items():
        if name not in model["init_args"] or model["init_args"][name] == "auto":
            continue  # "auto" takes the checkpoint's value
        default = describe(_default(kind_of_model, name))
        if kind is Schedule:
            default = {"class_path": f"{EDM.__module__}.{EDM.__qualname__}"}
        now, then = (
            _flat(_parsed(kind, given) or given, f"model.{name}")
            for given in (model["init_args"][name] or default, saved.get(name) or default)
        )
        changed = [key for key in now | then if now.get(key) != then.get(key)]
        # arguments of another class may all differ
        changed = [f"model.{name}"] if f"model.{name}" in changed else changed
        changes += [Change(key, now.get(key), then.get(key)) for key in changed]
    return changes


def _default(kind: Any, name: str) -> Any:
    """Return the default of an argument of a class or function, or of a base class."""
    kinds = getattr(kind, "__mro__", (kind,))
    parameters = (inspect.signature(each).parameters.get(name) for each in kinds)
    defaults = (each.default for each in parameters if each is not None)
    return next((each for each in defaults if each is not inspect.Parameter.empty), None)


def _parsed(kind: Any, given: Any) -> Any:
    """Return settings with all defaults, or None if they do not fit the type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--given", type=kind)
    try:
        return parser.parse_object({"given": given}).as_dict()["given"]
    except ArgumentError:
        return None


def _flat(settings: Any, name: str) -> dict[str, Any]:
    """Return ``a.b: value`` for nested settings; the name alone stands for their class."""
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
