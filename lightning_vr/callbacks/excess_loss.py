"""Excess loss in a run: whether it is known, what each step adds, how it is shown and written.

``variance.excess_loss`` holds the theory. It needs the curve of the whole training set: a part of
it has another posterior mean and less variance, and the difference would be taken for excess loss.
"""

import csv
import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.callbacks.target_variance_report import numbers as numbers_by_level
from lightning_vr.core.types import LossEstimate
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import log_picture, run_folder, training_goes_on
from lightning_vr.lifecycle.training_set import training_loader
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.excess_loss import ExcessLoss, LossParts
from lightning_vr.variance.irreducible_variance import IrreducibleVariance
from lightning_vr.variance.target_curves import TargetVarianceCurve

log = logging.getLogger(__name__)


def start(
    trainer: Trainer,
    module: LightningModule,
    curve: TargetVarianceCurve,
    state: dict[str, Tensor] | None,
) -> ExcessLoss | None:
    """Return sums on the module's device, or None if its excess loss is unknown, and log why.

    Args:
        trainer: A trainer that is fitting.
        module: What trains; None is returned unless it is a DiffusionModule.
        curve: Target variance of the training set.
        state: Sums of a checkpoint on the same curve, or None.
    """
    if not isinstance(module, DiffusionModule):
        return None
    own = own_references(trainer, module, curve.size)
    reason = _why_unknown(trainer, module, curve, own)
    if reason is not None:
        if trainer.is_global_zero:
            log.warning("TargetVariance logs no excess loss: %s.", reason)
        return None
    switch = module.target.switch if isinstance(module.target, STF) else 0.0
    return ExcessLoss(IrreducibleVariance(curve, own, switch), state).to(module.device)


@torch.no_grad()
def add(excess: ExcessLoss, module: DiffusionModule, estimate: LossEstimate) -> None:
    """Add the draws of one step, once the module has made its ``estimate`` of them."""
    noised = estimate.noised
    scale = noised.weight * module.weighting(module.schedule, noised.t) / noised.x0[0].numel()
    excess.add(noised.noise_level, estimate.per_draw, scale)


def numbers(excess: ExcessLoss) -> dict[str, float]:
    """Add up what is recent over all ranks, and return the means by name.

    Names are those of loggers: ``excess_loss/s0.5``, ``excess_loss/total``.
    """
    excess.advance()
    parts, total = excess.by_level(), excess.total()
    columns = {"excess_loss": parts.excess, "irreducible_loss": parts.irreducible}
    found = numbers_by_level(excess.noise_levels, columns, prefix="")
    totals = {
        "excess_loss/total": float(total.excess),
        "irreducible_loss/total": float(total.irreducible),
    }
    return found | {name: value for name, value in totals.items() if not math.isnan(value)}


def write(trainer: Trainer, excess: ExcessLoss) -> None:
    """Write the picture and the file to the run's folder. All ranks must call it."""
    folder = run_folder(trainer)
    if trainer.is_global_zero:
        with training_goes_on(trainer, "The excess loss"):
            write_csv(excess, folder / "excess_loss.csv")
            draw(excess, folder / "excess_loss.png")
            log_picture(trainer, "excess_loss", folder / "excess_loss.png")


def own_references(trainer: Trainer, module: LightningModule, size: int) -> int | None:
    """Return how many of ``size`` samples the module's own STF uses as references, if it does."""
    target = getattr(module, "target", None)
    if not isinstance(target, STF):
        return None
    if target.references == "all":
        return size
    if target.references == "batch":
        return min(size, (training_loader(trainer).batch_size or 0) * trainer.world_size) or None
    return int(target.references) if int(target.references) <= size else None


def write_csv(excess: ExcessLoss, path: Path) -> None:
    """Write one row for each noise level."""
    parts = excess.by_level()
    with replacing(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("noise_level", *LossParts._fields))
        writer.writerows(torch.stack([excess.noise_levels, *parts], dim=1).tolist())


@frees_figure
def draw(excess: ExcessLoss, path: Path) -> None:
    """Draw loss, irreducible part and excess against the noise level, to a PNG.

    The axis is linear below the smallest loss that is resolved from 0, as noise may make the excess
    negative, and logarithmic above.
    """
    from matplotlib.figure import Figure

    parts, total = excess.by_level(), excess.total()
    levels = excess.noise_levels.numpy()
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    axes.set_yscale("symlog", linthresh=_linear_below(parts))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(levels, parts.loss.numpy(), "o-", markersize=3, color="black", label="loss")
    axes.plot(
        levels, parts.irreducible.numpy(), "--", color="tab:gray", label="irreducible (target)"
    )
    axes.plot(levels, parts.excess.numpy(), "o-", markersize=3, color="tab:red", label="excess")
    low, high = parts.excess - parts.excess_error, parts.excess + parts.excess_error
    axes.fill_between(levels, low.numpy(), high.numpy(), color="tab:red", alpha=0.2, linewidth=0)

    axes.set_xlabel("noise level  s = σ / α  (unit of the data)")
    axes.set_ylabel("loss per dimension")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(
        f"Distance from the optimum, ± one standard error\nin all: loss {float(total.loss):.3g} = "
        f"irreducible {float(total.irreducible):.3g} + excess {float(total.excess):.3g}"
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _why_unknown(
    trainer: Trainer, module: DiffusionModule, curve: TargetVarianceCurve, own: int | None
) -> str | None:
    """Return why the irreducible part of the loss is unknown, or None."""
    dataset: Any = training_loader(trainer).dataset
    if curve.size < len(dataset):
        return (
            f"the curve of {curve.size} samples is not that of all {len(dataset)}, "
            f"as `max_data` or samples that are not finite left some out"
        )
    if not isinstance(module.target, (DSM, STF)):
        return f"the variance of the target {type(module.target).__name__} is not known"
    if isinstance(module.target, STF) and own is None:
        return "the number of references in a batch is not known"
    return None


def _linear_below(parts: LossParts) -> float:
    known = _positive(parts.excess_error)
    known = known if len(known) else _positive(parts.loss)
    return float(known.median()) if len(known) else 1.0


def _positive(values: Tensor) -> Tensor:
    return values[values.isfinite() & (values > 0)]
