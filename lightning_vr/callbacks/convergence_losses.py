"""What ``Convergence`` measures of a module: its loss at given draws, and where the draws lie."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_vr.core.rng import generator, seed_global_rng
from lightning_vr.core.types import Clean, Noised, TargetEstimate
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import Precision
from lightning_vr.variance.convergence_monitor import given_losses
from lightning_vr.variance.given_loss import LossFunction, given_clean, sees_conditions


@dataclass(frozen=True)
class MeasuredLoss:
    """The loss of a module with the plain target.

    Attributes:
        losses: Loss of each of B draws ``(B,)``.
        clean: A batch's clean samples.
        schedule: Scales of sample and noise.
        timesteps: Density of t.
        scale: Loss per squared error in x0 space of B draws ``(B,)``; None if unknown.
    """

    losses: Callable[[Noised], Tensor]
    clean: Callable[[Any], Clean]
    schedule: Schedule
    timesteps: Density
    scale: Callable[[Noised], Tensor] | None = None


def measured_loss(
    trainer: Trainer,
    module: LightningModule,
    loss: LossFunction | None,
    schedule: Schedule | None,
    clean: Callable[[Any], Any] | None,
) -> MeasuredLoss:
    """Return the loss to measure: the given one, or that of a ``DiffusionModule``."""
    precision = trainer.precision_plugin.forward_context
    if loss is None:
        assert isinstance(module, DiffusionModule)
        return _of_diffusion(module, precision)
    assert schedule is not None
    schedule = schedule.to(module.device)
    given = loss

    def losses(noised: Noised) -> Tensor:
        with precision():
            return given_losses(given, module, noised)

    def samples(batch: Any) -> Clean:
        found = given_clean(batch if clean is None else clean(batch))
        # to a loss that sees no labels, samples of all classes are exchangeable
        return found if sees_conditions(given) else Clean(found.x0)

    return MeasuredLoss(losses, samples, schedule, schedule.default_timesteps())


def _of_diffusion(module: DiffusionModule, precision: Precision) -> MeasuredLoss:
    def losses(noised: Noised) -> Tensor:
        ones = torch.ones_like(noised.t)
        target = TargetEstimate(noised.x0, ones, torch.zeros_like(ones))
        source = generator("fixed draws", "loss", device=noised.t.device)
        with precision(), seed_global_rng(source):
            return diffusion_loss(module.predict, noised, target, module.objective).per_draw

    def scale(noised: Noised) -> Tensor:
        weight: Tensor = module.weighting(module.schedule, noised.t)
        return weight / noised.x0[0].numel()

    return MeasuredLoss(losses, module.clean, module.schedule, module.timesteps, scale)
