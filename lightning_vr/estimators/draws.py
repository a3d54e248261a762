"""Draws of (t, noise) for clean samples.

The plain estimator takes one independent time and noise for each sample. It is unbiased, and the
whole of its noise is what the other estimators remove parts of.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_vr.schedules import Schedule, expand
from lightning_vr.timesteps import Density
from lightning_vr.types import Clean, Noised


class Draws(nn.Module, ABC):
    """Decides at which times and with which noise the clean samples are noised.

    Times and noise are drawn one after the other, so that a measurement can keep the times and
    draw the noise again.
    """

    couples_rows: bool = False
    """Whether the draws of one batch depend on each other beyond those of one sample."""

    @abstractmethod
    def times(
        self, clean: Clean, schedule: Schedule, timesteps: Density, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw a time for each draw, and its importance weight p/q.

        Args:
            clean: B clean samples.
            schedule: Scales of sample and noise.
            timesteps: The density p(t) that the loss is an expectation over.
            generator: Source of all randomness.

        Returns:
            Times and weights, ``(K·B,)`` each, those of one sample next to each other: row i
            belongs to sample i // K.
        """

    def forward(
        self, clean: Clean, schedule: Schedule, timesteps: Density, generator: torch.Generator
    ) -> Noised:
        """Noise ``clean`` at times drawn for it; arguments as for ``times``."""
        t, weight = self.times(clean, schedule, timesteps, generator)
        return self.noise(clean, schedule, t, weight, generator)

    def noise(
        self,
        clean: Clean,
        schedule: Schedule,
        t: Tensor,
        weight: Tensor,
        generator: torch.Generator,
    ) -> Noised:
        """Noise ``clean`` at given times: K·B draws."""
        return noise_samples(clean, schedule, t, weight, generator)


class IID(Draws):
    """One independent time and noise for each sample; importance weights are 1."""

    def times(
        self, clean: Clean, schedule: Schedule, timesteps: Density, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        t = timesteps(open_uniform(len(clean.x0), generator)).to(torch.float32)
        return t, torch.ones_like(t)


def open_uniform(count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` uniform numbers in the open interval (0, 1), float64."""
    u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    return u.clamp(min=2.0**-54)


def noise_samples(
    clean: Clean, schedule: Schedule, t: Tensor, weight: Tensor, generator: torch.Generator
) -> Noised:
    """Noise each clean sample at its time ``t (B,)``, in float32 or better."""
    x0 = clean.x0 if clean.x0.dtype == torch.float64 else clean.x0.float()
    noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    xt = expand(alpha, x0) * x0 + expand(sigma, x0) * noise
    return Noised(xt, x0, noise, t, alpha, sigma, weight, clean.group, clean.cond, clean.index)
