"""Draws of (t, noise) for clean samples.

The plain estimator draws one independent time and noise for each sample. It is unbiased; the other
estimators remove parts of its noise.
"""

import sys
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from lightning_vr.core.conditions import Condition, replaced
from lightning_vr.core.types import (
    UNLABELLED,
    WHOLE_STEP,
    Clean,
    DrawEstimate,
    Noised,
    StepPart,
    Times,
)
from lightning_vr.estimators.slot import Slot
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import Schedule, expand


class Draws(Slot, ABC):
    """Decides at which times and with which noise the clean samples are noised.

    Times are drawn first and noise second, so that a measurement can keep the times and draw the
    noise again.
    """

    @property
    def couples_rows(self) -> bool:
        """Whether the draws of different samples depend on each other."""
        return False

    @property
    def draws_per_sample(self) -> int:
        """K, the number of draws of each sample."""
        return 1

    def chunk(self, draws: int, device: torch.device) -> int:
        """Return how many of a batch's draws pass through the network at a time on a device."""
        return draws

    def has_chunks(self, device: torch.device) -> bool:
        """Return whether more draws pass in several chunks, however many a batch has now."""
        return self.chunk(sys.maxsize, device) < sys.maxsize

    @abstractmethod
    def times(
        self,
        clean: Clean,
        objective: Objective,
        generator: torch.Generator,
        part: StepPart = WHOLE_STEP,
    ) -> Times:
        """Draw K times for each sample.

        Args:
            clean: B clean samples.
            objective: What the loss is an expectation of.
            generator: Source of the randomness that parts of a step do not share.
            part: The part of an optimizer step that the samples are.
        """

    def forward(
        self,
        clean: Clean,
        objective: Objective,
        generator: torch.Generator,
        part: StepPart = WHOLE_STEP,
    ) -> Noised:
        """Noise ``clean`` at times drawn for it; arguments as for ``times``."""
        times = self.times(clean, objective, generator, part)
        return self.noise(clean, objective.schedule, times, generator)

    def noise(
        self, clean: Clean, schedule: Schedule, times: Times, generator: torch.Generator
    ) -> Noised:
        """Noise ``clean`` at given times: K·B draws."""
        return noise_samples(clean, schedule, times.t, times.weight, generator, times.loss_weight)

    def check(self, objective: Objective) -> None:
        """Raise if the draws would not estimate the objective."""

    def observe(self, estimate: DrawEstimate, objective: Objective) -> None:
        """Learn from the losses of a micro-step."""

    def advance(self) -> None:
        """Learn from what all ranks have observed; all must call it, after the optimizer step."""


class IID(Draws):
    """One independent time and noise for each sample; importance weights are 1."""

    def times(
        self,
        clean: Clean,
        objective: Objective,
        generator: torch.Generator,
        part: StepPart = WHOLE_STEP,
    ) -> Times:
        t = objective.timesteps.icdf(open_uniform(len(clean.x0), generator)).to(torch.float32)
        return Times(t, torch.ones_like(t))


def open_uniform(count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` uniform numbers in the open interval (0, 1), float64."""
    u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    return u.clamp(min=2.0**-54)


def drop_conditions(
    noised: Noised,
    label_dropout: float,
    cond_dropout: float,
    null: Condition | None,
    source: torch.Generator,
) -> Noised:
    """Drop labels and conditions at random, for classifier-free guidance (arXiv 2207.12598).

    Both are dropped by one random number for each draw, so that of equal fractions both are dropped
    together, as guidance leaves them out.

    Args:
        noised: B draws.
        label_dropout: Fraction of labels that become ``UNLABELLED``.
        cond_dropout: Fraction of conditions that become ``null``.
        null: What stands for no condition, of one row.
        source: Generator of the randomness.
    """
    drops_labels = label_dropout > 0 and noised.group is not None
    drops_cond = cond_dropout > 0 and noised.cond is not None
    if not (drops_labels or drops_cond):
        return noised
    device = noised.t.device
    u = torch.rand(len(noised.t), generator=source, device=device, dtype=torch.float32)
    if noised.group is not None:
        noised = replace(noised, group=torch.where(u < label_dropout, UNLABELLED, noised.group))
    if noised.cond is None or null is None:
        return noised
    dropped = u < cond_dropout
    number = noised.cond_group
    return replace(
        noised,
        cond=replaced(noised.cond, null, dropped),
        cond_group=None if number is None else torch.where(dropped, UNLABELLED, number),
    )


def noise_samples(
    clean: Clean,
    schedule: Schedule,
    t: Tensor,
    weight: Tensor,
    generator: torch.Generator,
    loss_weight: Tensor | None = None,
) -> Noised:
    """Noise each clean sample at its K times ``t (K·B,)``, in float32 or better."""
    clean = clean.repeated(len(t) // len(clean.x0))
    x0 = clean.x0 if clean.x0.dtype == torch.float64 else clean.x0.float()
    noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    alpha, sigma = schedule.scales(t)
    xt = expand(alpha, x0) * x0 + expand(sigma, x0) * noise
    return Noised(
        xt,
        x0,
        noise,
        t,
        alpha,
        sigma,
        weight,
        clean.group,
        clean.cond,
        clean.index,
        loss_weight,
        cond_group=clean.cond_group,
    )
