"""A generator that makes a sample from noise by one call of a network, as a teacher denoises it."""

import torch
from torch import Tensor, nn

from lightning_vr.core.conditions import Condition
from lightning_vr.training.diffusion import Diffusion


class OneStepStudent(nn.Module):
    """A trainable model that denoises pure noise: ``x = x0_hat(sigma(T) noise, T)``.

    At the largest time T of the schedule hardly any signal is left, so that the scale of the noise
    is that of x_T.

    Args:
        model: The model; it is trained.
    """

    def __init__(self, model: Diffusion) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, noise: Tensor, group: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        """Return samples ``(B, *)`` from standard normal noise ``(B, *)``."""
        schedule = self.model.schedule
        t = torch.full((len(noise),), schedule.t_max, device=noise.device)
        scale = schedule.sigma(t[:1])
        return self.model.denoise(scale * noise, t, group, cond)
