"""Excess loss in a run: whether it can be told, what each step adds, where it is written.

``variance.excess`` holds the theory. It takes the curve of all that the network trains on: a part
of the training set has another posterior mean and less variance, and its curve would be mistaken
for excess loss.
"""

import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_vr.callbacks import excess_loss_report as report
from lightning_vr.core.types import LossEstimate
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.lifecycle.loggers import log_picture, run_folder, training_goes_on
from lightning_vr.lifecycle.training_set import training_loader
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.excess_loss import ExcessLoss
from lightning_vr.variance.irreducible_variance import IrreducibleVariance
from lightning_vr.variance.target_curves import TargetVarianceCurve

log = logging.getLogger(__name__)


def start(
    trainer: Trainer,
    module: LightningModule,
    curve: TargetVarianceCurve,
    state: dict[str, Tensor] | None,
) -> ExcessLoss | None:
    """Return sums on the module's device, or None if its excess loss cannot be told, and log why.

    Args:
        trainer: A trainer that is fitting.
        module: What trains; None is returned for what is no DiffusionModule.
        curve: Target variance of the training set.
        state: Sums of a checkpoint on the same curve, or None.
    """
    if not isinstance(module, DiffusionModule):
        return None
    own = own_references(trainer, module, curve.size)
    reason = _obstacle(trainer, module, curve, own)
    if reason:
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
    """Take in what was added, over all ranks, and return the means by name."""
    excess.advance()
    return report.numbers(excess)


def write(trainer: Trainer, excess: ExcessLoss) -> None:
    """Write the picture and the file to the run's folder. All ranks must call it."""
    folder = run_folder(trainer)
    if trainer.is_global_zero:
        with training_goes_on(trainer, "The excess loss"):
            report.write_csv(excess, folder / "excess_loss.csv")
            report.draw(excess, folder / "excess_loss.png")
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


def _obstacle(
    trainer: Trainer, module: DiffusionModule, curve: TargetVarianceCurve, own: int | None
) -> str:
    dataset: Any = training_loader(trainer).dataset
    if curve.size < len(dataset):
        return (
            f"the curve of {curve.size} samples is not that of all {len(dataset)}, "
            f"set `max_data` to {len(dataset)} for it"
        )
    if not isinstance(module.target, (DSM, STF)):
        return f"the variance of the target {type(module.target).__name__} is not known"
    if isinstance(module.target, STF) and own is None:
        return "the number of references in a batch is not known"
    return ""
