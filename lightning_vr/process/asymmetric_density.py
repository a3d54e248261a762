"""The density of SpeeD: fewer draws at times near pure noise, where a step changes little.

Times before ``turn`` are drawn ``factor`` times as often as those after it (Wang et al. 2024, arXiv
2405.17403). Its published code puts the turn where the standard deviation of the noise grows by
less than 1e-4 a timestep, with a factor of 5, and weighs the loss by ``P2Weighting(1, 1)``.
"""

import math

import torch
from torch import Tensor

from lightning_vr.core.validation import check_positive
from lightning_vr.process.timesteps import Density


class Asymmetric(Density):
    """t uniform on each side of ``turn``, ``factor`` times as likely below it.

    It changes the objective.

    Args:
        turn: Time from which on fewer are drawn.
        factor: Density before the turn over that after it.
        low: Smallest time.
        high: Largest time; 1000 for most schedulers of diffusers.
    """

    changes_objective = True

    def __init__(
        self, turn: float = 0.7, factor: float = 5.0, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__()
        check_positive("factor", factor)
        if not -math.inf < low < turn < high < math.inf:
            raise ValueError(
                f"`turn` must lie between `low` and `high`, got {low}, {turn} and {high}: change "
                f"one of them."
            )
        self.turn, self.factor, self.low, self.high = turn, factor, low, high
        mass = factor * (turn - low)
        self._share = mass / (mass + high - turn)

    def icdf(self, u: Tensor) -> Tensor:
        before = self.low + (self.turn - self.low) * u / self._share
        after = self.high - (self.high - self.turn) * (1 - u) / (1 - self._share)
        return torch.where(u < self._share, before, after)

    def cdf(self, t: Tensor) -> Tensor:
        before = self._share * (t - self.low) / (self.turn - self.low)
        after = 1 - (1 - self._share) * (self.high - t) / (self.high - self.turn)
        return torch.where(t < self.turn, before, after).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        before = math.log(self._share / (self.turn - self.low))
        after = math.log((1 - self._share) / (self.high - self.turn))
        density = torch.where(t < self.turn, t.new_tensor(before), t.new_tensor(after))
        return torch.where((t >= self.low) & (t <= self.high), density, -math.inf)
