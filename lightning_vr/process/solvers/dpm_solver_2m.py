"""DPM-Solver++(2M): second order with one evaluation for each step (Lu et al. 2022, 2211.01095).

With ``h = log(s / s')`` the ODE has the exact solution ``z' = s'/s z + (1 - s'/s) D`` if x0_hat is
constant D. Algorithm 2 takes for D the line through the last two estimates, at half of the step,

    D = x0_hat + h / (2 h_before) (x0_hat - x0_hat_before).

The first step and the last one, to s' = 0, are of first order.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lightning_vr.process.solvers.solver import Problem, Solver


@dataclass(frozen=True)
class DPMSolver2M(Solver):
    """One evaluation of the network for each step, as deterministic as Heun's."""

    def solve(self, problem: Problem, noise: Tensor) -> Tensor:
        z = problem.levels[0] * noise
        x0_before, length_before = z, math.inf
        for level, next_level in pairwise(problem.levels):
            x0 = problem.x0_hat(z, level)
            length = math.log(level / next_level)
            slope = length / (2 * length_before)
            middle = x0 + slope * (x0 - x0_before)
            z = middle + next_level / level * (z - middle)
            x0_before, length_before = x0, length
        return problem.x0_hat(z, problem.levels[-1])

    def evaluations(self, steps: int) -> int:
        return steps
