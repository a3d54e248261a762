"""A distillation whose times and noise can be drawn again: what measurements of variance need."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.rows import Rows, tensors
from lightning_vr.core.types import Clean, Noised, Times
from lightning_vr.estimators.loss import loss_weight
from lightning_vr.process.schedules import expand
from lightning_vr.training.noisy_losses import Precision
from lightning_vr.variance.gradient_measurement import NoisyLoss


class NoisyDistillation(NoisyLoss):
    """The pull of a teacher on the outputs of an upstream, ``⟨x, w f⟩`` of each draw.

    Its gradient goes to the outputs, and from there to what has made them.

    Args:
        module: The module that distils, with ``draws``, ``objective`` and ``residual``.
        precision: The trainer's precision.
    """

    def __init__(
        self,
        module: Any,
        precision: Precision = nullcontext,
    ) -> None:
        super().__init__()
        self.module = module
        self.precision = precision

    @property
    def couples_rows(self) -> bool:  # type: ignore[override]
        """Whether draws share strata within a batch."""
        return bool(self.module.draws.couples_rows)

    def chunk(self, rows: int, device: torch.device) -> int:
        return int(self.module.draws.chunk(rows, device))

    def times(self, clean: Clean, source: torch.Generator, low: float, high: float) -> Times:
        times: Times = self.module.draws.times(
            clean, self.module.objective.between(low, high), source
        )
        return times

    def draw(self, clean: Clean, times: Times, source: torch.Generator) -> Rows:
        schedule = self.module.objective.schedule
        return {"noised": tensors(self.module.draws.noise(clean, schedule, times, source))}

    def forward(self, rows: Rows) -> Tensor:
        """Return the pull on each row ``(n,)``."""
        noised = Noised(**rows["noised"])
        with torch.no_grad(), self.precision():
            direction = self.module.residual(noised)
            weight = loss_weight(noised, self.module.objective)
        pull: Tensor = expand(weight, direction) * direction * noised.x0
        return pull.flatten(1).sum(dim=1)
