"""What is learned: the loss as an expectation, however it is estimated.

    L = E_{t ~ p} E_{x0, noise} [ λ(t) ‖x0_hat - x0‖² / d ]

The residual is formed in the network's own space, where the squared error carries ``λ b²``
(``predictions.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_vr.core.devices import device_of
from lightning_vr.process.diffusers_schedule import as_schedule
from lightning_vr.process.noise_level_densities import NoiseLevelDensity
from lightning_vr.process.noise_level_table import NoiseLevelTable
from lightning_vr.process.predictions import (
    Prediction,
    PredictionType,
    prediction,
    squared_jacobian,
)
from lightning_vr.process.schedules import KnownScales, Schedule
from lightning_vr.process.timesteps import Density, Truncated
from lightning_vr.process.total_weight import TotalWeighting, log_level_density
from lightning_vr.process.weightings import Weighting


class WeightedTimes(Protocol):
    """What a proposal needs to know of a loss: its density of times and its weight."""

    @property
    def timesteps(self) -> Density:
        """The density p(t) that the loss is an expectation over."""

    @property
    def parent(self) -> "WeightedTimes | None":
        """What this is a part of, or None."""

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight of the loss at times ``t (B,)``."""


@dataclass(frozen=True)
class Objective:
    """The diffusion loss as an expectation over times.

    Attributes:
        schedule: Scales of sample and noise.
        timesteps: The density p(t) that the loss is an expectation over.
        weighting: Loss weight λ(t) in x0 space.
        prediction: What the network predicts.
        sigma_data: Standard deviation of the data, for ``prediction="edm"``.
        parent: The objective that this one is a part of, or None.
    """

    schedule: Schedule
    timesteps: Density
    weighting: Weighting
    prediction: PredictionType = "edm"
    sigma_data: float = 0.5
    parent: "Objective | None" = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", as_schedule(self.schedule))

    def coefficients(self, t: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> Prediction:
        """Return the map from the network's output to x0_hat at times ``t (B,)``.

        Args:
            t: Times.
            scales: The schedule's alpha and sigma there, if they are known.
        """
        return prediction(self.prediction, self.schedule, t, self.sigma_data, scales)

    def weight(self, t: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return ``λ b²``, the weight on the squared error of the network's output, ``(B,)``.

        Arguments are those of ``coefficients``.
        """
        schedule = self.schedule if scales is None else KnownScales(self.schedule, t, scales)
        weight: Tensor = self.weighting(schedule, t)
        return weight * squared_jacobian(self.prediction, self.schedule, t, self.sigma_data, scales)

    def times(self, count: int) -> Tensor:
        """Return the time in the middle of each of ``count`` equally likely bins ``(count,)``."""
        return self.timesteps.middles(count, device_of(self.schedule))

    def noise_levels(self, count: int) -> Tensor:
        """Return the noise level at each of ``times(count)``, ``(count,)``."""
        return self.schedule.noise_level(self.times(count))

    def total_weight(self, noise_level: Tensor) -> Tensor:
        """Return W at noise levels ``(L,)``: all that matters of density and weight.

        It is the weight of the squared error of epsilon in the loss, per unit of log noise level
        (``total_weight.py``).
        """
        t = self.schedule.time(noise_level)
        density = log_level_density(self.schedule, self.timesteps, t)
        weight: Tensor = self.weighting(self.schedule, t)
        return density * weight * noise_level**2

    def split(
        self, noise_levels: Sequence[float], total: Sequence[float], second_moments: Sequence[float]
    ) -> "Objective":
        """Return an objective with a wanted total weight and the least gradient variance.

        Args:
            noise_levels: Increasing noise levels ``(L,)``, within those of the schedule.
            total: The wanted W at each; ``total_weight`` for that of this objective.
            second_moments: ``E ‖g‖²`` at each, positive, of the gradient of one draw's loss with
                the weight of *this* objective: ``GradientVariance``'s ``levels.second_moment``, or
                ``LearnedProposal.second_moments``.

        Raises:
            ValueError: If they are something else.
        """
        table = NoiseLevelTable(noise_levels, second_moments)
        if min(second_moments) <= 0:
            raise ValueError(
                f"`second_moments` must be positive, got {[*second_moments]}: leave out noise "
                f"levels at which none was measured."
            )
        levels = torch.tensor(table.noise_levels, dtype=torch.float64)
        own = self.weighting(self.schedule, self.schedule.time(levels)) * levels**2
        sizes = torch.tensor(table.values, dtype=torch.float64).sqrt() / own
        heights = torch.tensor([*total], dtype=torch.float64) * sizes
        density = NoiseLevelDensity(self.schedule, noise_levels, heights.tolist())
        weighting = TotalWeighting(noise_levels, total, density)
        return replace(self, timesteps=density, weighting=weighting)

    def between(self, low: float, high: float) -> "Objective":
        """Return the mean of the loss between two quantiles of p(t)."""
        if (low, high) == (0, 1):
            return self
        return replace(self, timesteps=Truncated(self.timesteps, low, high), parent=self)
