"""What a DiffusionModule refuses when it trains: data, derivatives, optimizer, trainer, ranks."""

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_vr.core.distributed import all_gather_rows
from lightning_vr.core.gradients import aliases, gradients_in_chunks
from lightning_vr.core.rows import row_count
from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.training.noisy_losses import DiffusionLoss

if TYPE_CHECKING:
    from lightning_vr.training.module import DiffusionModule


def check_derivatives(module: "DiffusionModule", clean: Clean) -> None:
    """Refuse a control variate that needs derivatives which the network does not have.

    Args:
        module: A module that is training.
        clean: Encoded samples, two at the least.
    """
    control, source = module.control_variate, module.generator("derivatives")
    if not isinstance(control, TaylorCV) or control.order == 0:
        return
    noised = control.draw(IID()(clean.rows(slice(0, 2)), module.objective, source), source)
    parameters = [p for p in module.network.parameters() if p.requires_grad]
    try:
        with module.trainer.precision_plugin.forward_context(), warnings.catch_warnings():
            # torch's first forward-mode derivative calls what torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            terms = control.terms(module.predict, noised, module.objective)
        torch.autograd.grad(terms.sum(), parameters, allow_unused=True)
    except Exception as error:  # whatever a network's own code raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"Argument `control_variate` of order {control.order} needs forward-mode derivatives "
            f"that can be differentiated again, but {type(module.network).__name__} has none "
            f"({reason[0].rstrip('.')}): use order=0, which needs none, or leave out what lacks "
            f"them, such as custom autograd functions without `jvp`, fused attention other than "
            f"torch's own, and activation checkpointing."
        ) from error


def check_gradients(module: "DiffusionModule", clean: Clean) -> None:
    """Refuse a network whose gradient cannot be taken as pilots take it, however late they come.

    Args:
        module: A module that is training.
        clean: Encoded samples.
    """
    loss = DiffusionLoss(module, module.trainer.precision_plugin.forward_context)
    source, some = module.generator("gradients"), clean.rows(slice(0, 2))
    with torch.no_grad():
        rows = loss.draw(some, loss.times(some, source, 0.0, 1.0), source)
    parameters, buffers = aliases(module)
    for parameter in parameters.values():
        parameter.requires_grad_()
    count = row_count(rows)
    gradients_in_chunks(module, loss, rows, count, aliases=parameters, buffers=buffers)


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


def check_trainer(module: "DiffusionModule") -> None:
    """Refuse a trainer that shards weights, compilation of the whole module, and Apple's GPUs."""
    strategy = module.trainer.strategy
    is_sharded = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
    if is_sharded or getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            f"Argument `strategy` expected to leave each rank the whole of the weights, as 'ddp' "
            f"does, but got {type(strategy).__name__}: what chunks, pilots and callbacks measure "
            f"by would be parts of them."
        )
    if module._compiler_ctx is not None or module._compiled_call_impl is not None:
        raise ValueError(
            f"Argument `model` expected not to be compiled as a whole, whose steps log and draw by "
            f"keys, but got a compiled {type(module).__name__}: compile the network, as in "
            f"DiffusionModule(torch.compile(network))."
        )
    if strategy.root_device.type == "mps":
        raise ValueError(
            "Argument `accelerator` expected to have float64, in which times are drawn, but got "
            "'mps': train with --trainer.accelerator cpu, or on another device."
        )


def check_ranks(draws: Draws, device: torch.device) -> None:
    """Refuse ranks that draw differently often; all must call it."""
    counts = all_gather_rows(torch.tensor([draws.draws_per_sample], device=device)).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"Argument `resamples` expected to be the same on all ranks, but got {counts}: their "
            f"gradients are averaged as if it were; configure all ranks alike."
        )
