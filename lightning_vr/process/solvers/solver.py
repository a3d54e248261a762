"""What all solvers share: the reverse process of every schedule in one pair of variables.

In ``z = x_t / alpha`` and ``s = sigma / alpha`` every schedule is the variance-exploding process,
whose probability-flow ODE is (Song et al. 2021, arXiv 2011.13456, equation 13; Karras et al. 2022,
arXiv 2206.00364, equation 4)

    dz/ds = eps,    eps = (z - x0_hat(z, s)) / s,

and whose score is ``-eps / s``. A step of a solver goes from (z, s) to (z', s'), whatever the
schedule; only the network is called with ``x_t = alpha z`` and t.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.solvers.row_noise import RowNoise

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x_t (B, *), t (B,)) -> x0_hat (B, *)``."""


@dataclass(frozen=True)
class Problem:
    """What is to be solved for one batch.

    Attributes:
        denoiser: Estimates x0 from x_t and t, both of ``dtype``.
        schedule: The schedule that it was trained with.
        steps: Number of steps that were asked for.
        levels: Decreasing noise levels sigma/alpha, without the final 0.
        noise: Source of standard normal numbers for this batch.
        dtype: What the denoiser takes; the state is float64 where the device has it, because
            rounding errors add up over the steps.
        estimate: What the denoiser estimates, and what the network says about the variance.
    """

    denoiser: Denoiser
    schedule: Schedule
    steps: int
    levels: tuple[float, ...]
    noise: RowNoise
    dtype: torch.dtype
    estimate: Callable[[Tensor, Tensor], ReverseEstimate]

    def x0_hat(self, z: Tensor, level: float) -> Tensor:
        """Return the denoised ``z (B, *)`` at one noise level."""
        t = self.schedule.time(torch.tensor(level, dtype=torch.float64))
        xt = float(self.schedule.alpha(t)) * z
        times = t.to(self.dtype).to(z.device).expand(len(z))
        return self.denoiser(xt.to(self.dtype), times).to(z.dtype)

    def add_noise(self, z: Tensor, std: float) -> Tensor:
        """Return ``z (B, *)`` with normal noise of standard deviation ``std`` added."""
        return z + std * self.noise.like(z)


class Solver(ABC):
    """Turns noise into samples. Solvers are settings: they keep nothing between batches.

    Attributes:
        unused: Settings of ``Sampler`` that have no meaning for the solver and must be left out.
    """

    unused: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def solve(self, problem: Problem, noise: Tensor) -> Tensor:
        """Turn standard normal ``noise (B, *)`` into samples ``(B, *)``."""

    @abstractmethod
    def evaluations(self, steps: int) -> int | None:
        """Return how often the network is called for ``steps`` noise levels, None if unknown."""

    def own_noise_levels(self, schedule: Schedule, steps: int) -> Tensor | None:
        """Return noise levels that take the place of the sampler's grid, or None."""
        return None


class StepSolver(Solver):
    """A solver that forgets what came before a step."""

    @abstractmethod
    def step(self, problem: Problem, z: Tensor, level: float, next_level: float) -> Tensor:
        """Take the state from a noise level to the next, which is 0 in the last step."""

    def solve(self, problem: Problem, noise: Tensor) -> Tensor:
        z = problem.levels[0] * noise
        for level, next_level in pairwise((*problem.levels, 0.0)):
            z = self.step(problem, z, level, next_level)
        return z
