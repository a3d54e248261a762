"""Excess loss in a run: whether it is known, what each step adds, its numbers and picture.

``variance.excess_loss`` holds the theory. It needs the curve of the whole training set: a part of
it has another posterior mean and less variance, and the difference would be taken for excess loss.
"""

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
from lightning_vr.lifecycle.loggers import log_picture, training_goes_on
from lightning_vr.lifecycle.training_set import training_loader
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.excess_loss import ExcessLoss, LossParts
from lightning_vr.variance.irreducible_variance import IrreducibleVariance
from lightning_vr.variance.target_curves import TargetVarianceCurve

log = logging.getLogger(__name__)

COLUMNS = ("noise_level", *LossParts._fields)
"""Columns of ``excess_loss.csv`` after ``step``."""


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


def totals(excess: ExcessLoss) -> dict[str, float]:
    """Return the means over all noise levels by name, as of the last ``advance``.

    ``target_variance/removed_fraction`` is the fraction of ``target_variance/dsm_total``, the
    irreducible loss of the plain target, that the module's own target removes.
    """
    total = excess.total()
    found = {
        "excess_loss/total": float(total.excess),
        "irreducible_loss/total": float(total.irreducible),
        "target_variance/dsm_total": float(total.irreducible_dsm),
        "target_variance/removed_fraction": float(1 - total.irreducible / total.irreducible_dsm),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def by_level(excess: ExcessLoss) -> dict[str, float]:
    """Return the means at each noise level by name, such as ``excess_loss/s0.5``."""
    parts = excess.by_level()
    columns = {"excess_loss": parts.excess, "irreducible_loss": parts.irreducible}
    return numbers_by_level(excess.noise_levels, columns, prefix="")


def rows(excess: ExcessLoss) -> list[list[float]]:
    """Return a row of ``COLUMNS`` for each noise level."""
    found: list[list[float]] = torch.stack(
        [excess.noise_levels, *excess.by_level()], dim=1
    ).tolist()
    return found


def show(trainer: Trainer, excess: ExcessLoss, folder: Path, *, is_logged: bool = True) -> None:
    """Draw the picture in the run's folder, and show it and a table in loggers; on rank 0 alone."""
    path = folder / "excess_loss.png"
    with training_goes_on(trainer, "The excess loss"):
        draw(excess, path)
        if is_logged:
            log_picture(trainer, "excess_loss", path, (COLUMNS, rows(excess)))


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
