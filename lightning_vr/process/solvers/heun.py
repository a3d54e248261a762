"""Heun's method, of second order: the trapezoidal rule on Euler's step.

With eps' at the end of Euler's step, ``z' = z + (s' - s) (eps + eps') / 2``: algorithm 1 of Karras
et al. 2022, arXiv 2206.00364. The last step, to s' = 0, is Euler's.
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_vr.process.solvers.solver import Problem, StepSolver


@dataclass(frozen=True)
class Heun(StepSolver):
    """Two evaluations of the network for each step, one for the last."""

    def step(self, problem: Problem, z: Tensor, level: float, next_level: float) -> Tensor:
        x0 = problem.x0_hat(z, level)
        if next_level == 0:
            return x0
        eps = (z - x0) / level
        end = x0 + next_level * eps
        next_eps = (end - problem.x0_hat(end, next_level)) / next_level
        return z + (next_level - level) * (eps + next_eps) / 2

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1
