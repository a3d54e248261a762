"""Euler's method: deterministic DDIM, of first order.

A step is ``z' = x0_hat + s' eps``, exact if x0_hat does not change on the way (Song et al. 2021,
arXiv 2010.02502, equation 13).
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_vr.process.solvers.solver import Problem, StepSolver


@dataclass(frozen=True)
class Euler(StepSolver):
    """One evaluation of the network for each step; DDIM without noise."""

    def step(self, problem: Problem, z: Tensor, level: float, next_level: float) -> Tensor:
        x0 = problem.x0_hat(z, level)
        return x0 + next_level / level * (z - x0)

    def evaluations(self, steps: int) -> int:
        return steps
