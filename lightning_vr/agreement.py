"""What the parts of a DiffusionModule refuse of each other: network, times, guidance, optimizer."""

import copy
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_vr.objective import Objective


def check_call(network: nn.Module, num_classes: int | None, *, may_condition: bool) -> None:
    """Refuse a network that cannot be called as a module does that does not override ``predict``.

    Args:
        network: The network.
        num_classes: Number of classes of the module, or None.
        may_condition: Whether the module's own ``encode`` may give the labels as a condition.

    Raises:
        ValueError: If it takes other arguments, or labels that it will not get.
    """
    name = type(network).__name__
    labels = {} if num_classes is None else {"class_labels": None}
    try:
        # what it asks for besides may come as a condition
        inspect.signature(network.forward).bind_partial(None, None, **labels)
    except TypeError as error:
        raise ValueError(
            f"Argument `network` is called as {name}(x, t{', class_labels=...' * len(labels)}), "
            f"but cannot be ({error}): use a network of that signature, or override `predict`."
        ) from error
    config = getattr(network, "config", None)
    embeddings = config.get("num_class_embeds") if isinstance(config, Mapping) else None
    if embeddings and not labels and not may_condition:
        raise ValueError(
            f"Argument `num_classes` expected to be given, as {name} has "
            f"num_class_embeds={embeddings}, but got None: set `num_classes` to {embeddings - 1}."
        )


def check_times(objective: Objective) -> None:
    """Refuse a density of times at which the schedule is none.

    Raises:
        ValueError: Naming the first of such times.
    """
    schedule, timesteps = objective.schedule, objective.timesteps
    times = timesteps(torch.linspace(1e-3, 1 - 1e-3, 101, dtype=torch.float64))
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    is_valid = (alpha > 0) & (sigma > 0) & torch.isfinite(sigma / alpha)
    if not bool(is_valid.all()):
        wrong = float(times[~is_valid][0])
        raise ValueError(
            f"Argument `timesteps` expected to draw times of the {type(schedule).__name__} "
            f"schedule, from {schedule.t_min:g} to {schedule.t_max:g}, but "
            f"{type(timesteps).__name__} draws {wrong:.3g}: leave it out, or use "
            f"Uniform({schedule.t_min:g}, {schedule.t_max:g})."
        )


def check_guidance(guidance: float, num_classes: int | None) -> None:
    """Refuse guidance without classes to guide to."""
    if guidance != 1 and num_classes is None:
        raise ValueError(
            f"Argument `guidance` of {guidance:g} needs classes: set `num_classes` and "
            f"`label_dropout`, or use guidance 1."
        )


def check_optimization(optimizer: Optimizer, schedule: Any) -> None:
    """Refuse rates that are not finite, and a schedule that divides by zero at its first step.

    Raises:
        ValueError: If training would fail, or go on with weights that are not finite.
    """
    for group in optimizer.param_groups:
        if not math.isfinite(group.get("lr", 0.0)):
            raise ValueError(f"Argument `lr` expected to be finite, but got {group['lr']}.")
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    trial = copy.copy(schedule)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.last_epoch += 1
            trial.get_lr()
    except ZeroDivisionError as error:
        raise ValueError(
            f"Argument `lr_scheduler`: {type(schedule).__name__} divides by zero: give its period, "
            f"such as `step_size` or `T_max`, 1 or more steps."
        ) from error
    except Exception:  # no schedule, or one of another kind: it tells when it is stepped
        return
    finally:
        # some schedules set the momentum when they are asked for the rate
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)
