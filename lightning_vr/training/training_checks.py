"""What is checked when training starts: derivatives of the network, optimizer, ranks."""

import copy
import math
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_vr.core.distributed import all_gather_numbers
from lightning_vr.core.gradients import mean_gradients
from lightning_vr.core.rows import row_count
from lightning_vr.core.sharding import is_sharded
from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.noisy_losses import DiffusionLoss


def check_sharded(model: Diffusion) -> None:
    """Raise if the weights are sharded and the control variate needs them whole.

    Raises:
        ValueError: If it takes derivatives by the input, or is fitted from gradients of each rank.
    """
    control = model.control_variate
    if not is_sharded(model) or not isinstance(control, TaylorCV):
        return
    if control.order > 0 or not control.is_fixed:
        raise ValueError(
            f"`control_variate` must be TaylorCV(order=0) with a `coefficient` and a `gate` where "
            f"weights are sharded, got order {control.order}, coefficient {control.coefficient} "
            f"and gate {control.gate!r}: give them, leave it out, or train with 'ddp'."
        )


def check_derivatives(model: Diffusion, run: RunContext, clean: Clean) -> None:
    """Raise if the network lacks the derivatives that the model's control variate needs.

    Args:
        model: A model that is training.
        run: The run that it trains in.
        clean: Encoded samples, at least two.
    """
    control, source = model.control_variate, model.generator("derivatives")
    if not isinstance(control, TaylorCV) or control.order == 0:
        return
    noised = control.draw(IID()(clean.rows(slice(0, 2)), model.objective, source), source)
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    try:
        with run.precision(), warnings.catch_warnings():
            # torch's first forward-mode derivative calls what torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            terms = control.terms(model.predict, noised, model.objective)
        torch.autograd.grad(terms.sum(), parameters, allow_unused=True)
    except Exception as error:  # a network's own code may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"`control_variate` of order {control.order} needs forward-mode derivatives that can "
            f"be differentiated again, but {type(model.network).__name__} has none "
            f"({reason[0].rstrip('.')}): use order=0, which needs none, or a network without "
            f"custom autograd functions that lack `jvp`, fused attention other than torch's own, "
            f"and activation checkpointing."
        ) from error


def check_gradients(model: Diffusion, run: RunContext, clean: Clean) -> None:
    """Raise at once if the network has no gradients of the kind that pilots take much later.

    Args:
        model: A model that is training.
        run: The run that it trains in.
        clean: Encoded samples.
    """
    loss = DiffusionLoss(model, run.precision)
    source, some = model.generator("gradients"), clean.rows(slice(0, 2))
    with torch.no_grad():
        rows = loss.draw(some, loss.times(some, source, 0.0, 1.0), source)
    mean_gradients(model, loss, rows, row_count(rows))


def check_optimization(optimizer: Optimizer, schedule: Any) -> None:
    """Raise if a learning rate is not finite, or a schedule divides by zero at its first step.

    Raises:
        ValueError: If training would fail, or its weights become infinite or NaN.
    """
    for group in optimizer.param_groups:
        if not math.isfinite(group.get("lr", 0.0)):
            raise ValueError(f"`lr` must be finite, got {group['lr']}: use a rate such as 1e-3.")
        for name, value in group.items():
            _check_size(name, value)
    for name in ("step_size", "T_max", "T_0"):
        if getattr(schedule, name, 1) < 1:
            raise ValueError(
                f"`lr_scheduler` must have a `{name}` of 1 or more steps, got "
                f"{getattr(schedule, name)}: use a number of steps."
            )
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    trial = copy.copy(schedule)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.last_epoch += 1
            trial.get_lr()
    except ZeroDivisionError as error:
        raise ValueError(
            f"`lr_scheduler` must have a period of 1 or more steps, got {type(schedule).__name__}, "
            f"which divides by zero: set its period, such as `step_size` or `T_max`, to 1 or more."
        ) from error
    except Exception:  # no schedule, or one of another kind: it raises when it is stepped
        return
    finally:
        # some schedules set the momentum when they are asked for the rate
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)


def check_schedules(schedules: list[Any], run: RunContext) -> None:
    """Raise if a schedule of a fixed length ends before the run does.

    Raises:
        ValueError: With the length that the run needs.
    """
    for schedule in schedules:
        steps = run.planned_steps() if isinstance(schedule, OneCycleLR) else 0
        if steps > getattr(schedule, "total_steps", math.inf):
            fix = (
                f"set it to {steps}" if steps < math.inf else "set `max_steps`, and it to the same"
            )
            raise ValueError(
                f"`lr_scheduler.total_steps` of OneCycleLR must be at least {steps}, the optimizer "
                f"steps of this run, got {schedule.total_steps}: {fix}."
            )


def _check_size(name: str, value: Any) -> None:
    """Raise if a setting of the optimizer does not fit into float32, as weights and moments do."""
    largest = torch.finfo(torch.float32).max
    for each in value if isinstance(value, (list, tuple)) and name != "params" else [value]:
        if isinstance(each, (int, float)) and largest < abs(each) < math.inf:
            raise ValueError(
                f"`{name}` of the optimizer must be at most {largest:.1e}, the largest number in "
                f"float32, got {each}: use a smaller one."
            )


def check_ranks(draws: Draws) -> None:
    """Raise if ranks take different numbers of draws; all must call it."""
    counts = [count for (count,) in all_gather_numbers([draws.draws_per_sample])]
    if len(set(counts)) > 1:
        raise ValueError(
            f"`resamples` must be the same on all ranks, whose gradients are averaged, got "
            f"{counts}: configure all ranks alike."
        )
