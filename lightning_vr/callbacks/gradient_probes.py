"""How GradientVariance measures while a trainer runs; each way is a probe in a file of its own.

* ``NestedProbe``: a loss whose times and noise can be drawn again. It gives components, also in
  bins of the noise level, per sample or by differences of batches.
* ``MicroBatchProbe``: any module under gradient accumulation or DDP. Hooks on the parameters see
  the gradient of each micro-batch, and the optimizer's gradient is that of all: free, at each step.
* ``HalfBatchProbe``: any other module, by its training step.

The last two know nothing of the loss and give the total variance alone.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_vr.core.distributed import rank
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.lifecycle.precision import loss_scale
from lightning_vr.variance.components import Components

ProbeResult = tuple[Components, dict[int, Components]]
"""Components of the whole gradient, by group, and of bins of the noise level."""


class GradientProbe:
    """Measures during training.

    Args:
        trainer: The trainer.
        module: The module that it trains.

    Attributes:
        names: Names of the groups of parameters.
        trainable: Names of the parameters that are trained.
        noise_levels: Noise level in the middle of each measured bin ``(L,)``.
        cost: About how many training steps one measurement costs.
    """

    cost: float = 0.0

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self.names, self.groups = parameter_groups(module)
        self.trainable = trainable_names(module)
        self.noise_levels = torch.zeros(0)

    @property
    def loss_scale(self) -> float:
        """Factor on losses in float16."""
        return loss_scale(self.trainer)

    def prepare(self, batch: Any) -> None:
        """Choose a method by the first batch, and raise if it cannot be measured on."""

    def before_any_batch(self, batch: Any) -> None:
        """Receive every batch before it is trained on."""

    def before_batch(self, batch: Any, batch_idx: int, number: int) -> ProbeResult | None:
        """Measure on a batch that is due."""
        return None

    def before_backward(self) -> None:
        """Note that the batch has a loss: a training step may return none."""

    def before_optimizer_step(self) -> Components | None:
        """Measure on the gradient that the optimizer is about to use."""
        return None

    def pending_batch(self) -> Any:
        """Return a batch that waits to be measured together with the next one, or None."""
        return None

    def restore_pending_batch(self, batch: Any) -> None:
        """Set such a batch, from a checkpoint."""

    def close(self) -> None:
        """Remove all hooks."""

    def source(self, *key: int | str) -> torch.Generator:
        """Return the generator of this run, this rank, this step and ``key``."""
        seed = getattr(self.module, "run_seed", torch.initial_seed() % 2**63)
        step = self.trainer.global_step
        return generator(seed, rank(), "gradient variance", step, *key, device=self.module.device)


def trainable_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained at present: callbacks may freeze some."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def with_total(groups: Components) -> Components:
    """Put the sum over all groups first."""
    return Components(*(torch.cat([x.sum(dim=0, keepdim=True), x]) for x in groups))
