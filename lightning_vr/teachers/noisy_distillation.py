"""A distillation whose times and noise can be drawn again: what measurements of variance need."""

import torch
from torch import Tensor

from lightning_vr.core.rows import Rows, tensors
from lightning_vr.core.types import Clean, Noised, Times
from lightning_vr.estimators.loss import loss_weight
from lightning_vr.process.schedules import expand
from lightning_vr.teachers.distillation import distill
from lightning_vr.training.noisy_losses import DrawnLoss


class NoisyDistillation(DrawnLoss):
    """The pull of a teacher on the outputs of an upstream, ``⟨x, w f⟩`` of each draw.

    Its gradient goes to the outputs, and from there to what has made them. The module that distils
    has a ``residual`` beside its draws and its objective.
    """

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

    @torch.no_grad()
    def observe(self, clean: Clean, source: torch.Generator) -> None:
        module = self.module
        with self.precision():
            found = distill(clean, module.residual, module.draws, module.objective, source)
        module.draws.observe(found, module.objective)
