"""The loss that a run is trained with, where its times and noise can be drawn again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_vr.callbacks.given_training import GivenTraining
from lightning_vr.core.rng import preserve_global_rng, seed_global_rng
from lightning_vr.core.types import Clean
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.noisy_losses import Precision
from lightning_vr.variance.given_loss import given_clean
from lightning_vr.variance.gradient_measurement import NoisyLoss


@dataclass(frozen=True)
class NoisyTraining:
    """A loss whose times and noise can be drawn again, and the bins of its noise level.

    Attributes:
        loss: The loss.
        clean: A function from a batch to clean samples.
        noise_levels: Noise level in the middle of each equally likely bin ``(L,)``.
        precision: The trainer's precision.
    """

    loss: NoisyLoss
    clean: Callable[[Any], Any]
    noise_levels: Tensor
    precision: Precision

    def encode(self, batch: Any, source: torch.Generator) -> Clean:
        """Return the clean samples of a batch; what encoding draws comes from ``source``."""
        with preserve_global_rng(), seed_global_rng(source), self.precision():
            return given_clean(self.clean(batch))


def noisy_training(
    trainer: Trainer, module: LightningModule, given: GivenTraining, levels: int
) -> NoisyTraining | None:
    """Return the loss of a run, or None if nobody says how to draw its noise again.

    Args:
        trainer: A trainer that is fitting.
        module: The module that it trains.
        given: What the user says of the loss, which goes before what the module itself says.
        levels: Number of bins of the noise level.
    """
    precision = trainer.precision_plugin.forward_context
    if given.loss is not None:
        loss = given.noisy_loss(module, precision)
        clean = given.clean or Clean.from_batch
        return NoisyTraining(loss, clean, given.noise_levels(levels), precision)
    if not isinstance(module, EstimatorModule):
        return None
    noise_levels = module.objective.noise_levels(levels)
    return NoisyTraining(module.noisy_loss(precision), module.clean, noise_levels, precision)
