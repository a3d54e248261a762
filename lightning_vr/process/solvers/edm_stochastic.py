"""The stochastic sampler of Karras et al. 2022 (arXiv 2206.00364), algorithm 2.

A step first raises the noise level from s to ``s (1 + gamma)`` by fresh noise, with
``gamma = min(churn / steps, sqrt(2) - 1)`` where s is within the given bounds and 0 elsewhere, and
then takes Heun's step from there. The noise corrects errors of earlier steps. It is never raised
above the largest level of the grid, which the network may not know beyond.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_vr.core.validation import check_at_least, check_finite_number, check_positive
from lightning_vr.process.solvers.heun import Heun
from lightning_vr.process.solvers.solver import Problem, StepSolver


@dataclass(frozen=True)
class EDMStochastic(StepSolver):
    """Heun's method with added noise; the defaults are those for ImageNet-64, without inflation.

    Attributes:
        churn: Amount of noise over all steps, S_churn; 0 is Heun's method.
        noise_level_min: Noise level below which none is added, S_tmin.
        noise_level_max: Noise level above which none is added, S_tmax.
        noise_scale: Factor on the noise, S_noise. Karras et al. use 1.003 to 1.007 for networks
            that remove slightly too much noise; 1 is right for an exact one.
    """

    churn: float = 40.0
    noise_level_min: float = 0.05
    noise_level_max: float = 50.0
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("churn", self.churn, 0)
        check_finite_number("churn", self.churn)
        check_positive("noise_scale", self.noise_scale)
        if not 0 <= self.noise_level_min < self.noise_level_max:
            raise ValueError(
                f"`noise_level_min` and `noise_level_max` of EDMStochastic must satisfy 0 <= min < "
                f"max, got {self.noise_level_min:g} and {self.noise_level_max:g}: change one of "
                f"them."
            )

    def step(self, problem: Problem, z: Tensor, level: float, next_level: float) -> Tensor:
        raised = level
        if self.noise_level_min <= level <= self.noise_level_max:
            gamma = min(self.churn / problem.steps, math.sqrt(2) - 1)
            raised = min(level * (1 + gamma), problem.levels[0])
        if raised > level:
            z = problem.add_noise(z, self.noise_scale * math.sqrt(raised**2 - level**2))
        return Heun().step(problem, z, raised, next_level)

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1
