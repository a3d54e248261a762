"""Ancestral sampling of second order: a step of the ODE to below s', then noise up to s'.

With the u of ``ddim.py`` the step of the ODE ends at ``d = sqrt(s'² - u²)``, and noise of standard
deviation u follows. Here that step is the midpoint rule in log s,

    z_m = x0_hat + m eps,   m = sqrt(s d),      z' = z + (d - s) eps(z_m, m) + u noise,

as k-diffusion's ``dpm_2_ancestral`` takes it (after DPM-Solver-2, Lu et al. 2022, arXiv
2206.00927). With Euler's rule it would be ``DDIM(eta)``. For eta <= 1 the midpoint is at s' or
above, so that the network sees no noise level below the grid's.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_vr.core.validation import check_fraction
from lightning_vr.process.solvers.ddim import ancestral_std
from lightning_vr.process.solvers.solver import Problem, StepSolver


@dataclass(frozen=True)
class Ancestral(StepSolver):
    """Two evaluations of the network for each step, one for the last.

    For Euler's method with ancestral noise, one evaluation for each step, use ``DDIM(eta=1)``.

    Attributes:
        eta: Part of the ancestral noise, between 0, the midpoint rule without noise, and 1.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("eta", self.eta)

    def step(self, problem: Problem, z: Tensor, level: float, next_level: float) -> Tensor:
        x0 = problem.x0_hat(z, level)
        if next_level == 0:
            return x0
        std = ancestral_std(self.eta, level, next_level)
        down = math.sqrt(next_level**2 - std**2)
        # rounding must not take the midpoint below the grid
        middle = max(math.sqrt(level * down), next_level)
        half = x0 + middle / level * (z - x0)
        eps = (half - problem.x0_hat(half, middle)) / middle
        z = z + (down - level) * eps
        return problem.add_noise(z, std) if std > 0 else z

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1
