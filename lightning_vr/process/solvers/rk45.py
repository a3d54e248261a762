"""Adaptive steps of Dormand and Prince (RK45) on the probability-flow ODE, through torchdiffeq.

The state is ``u = z / sqrt(1 + s²)``, of size one at each noise level for data of size one, so that
a tolerance means the same everywhere, and the variable is ``-log s``:

    du / d(-log s) = x0_hat / sqrt(1 + s²) - u / (1 + s²)

All rows of a batch take the same steps. A step counts as good enough if the error of each row, its
root mean square over coordinates, is within ``atol + rtol |u|``: the steps are those of the row
that needs the shortest, and a sample changes with its neighbours by no more than the error that
the tolerances leave: some ten times as much, as the errors of about ten steps add up.
Used for sampling by Song et al. 2021 (arXiv 2011.13456, section 4.3), with tolerances of 1e-5.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_vr.core.validation import check_positive
from lightning_vr.process.solvers.dormand_prince import dormand_prince
from lightning_vr.process.solvers.solver import Problem, Solver

_FIRST_STEP = 0.05
"""In log s. A guess from the slope, which is nearly 0 in noise alone, would leave the interval."""


@dataclass(frozen=True)
class RK45(Solver):
    """As many evaluations of the network as the tolerances ask for.

    They must be above the rounding of the network: 1e-3 for one in 16 bits.

    Attributes:
        rtol: Relative tolerance of each step.
        atol: Absolute tolerance of each step, in units of the data.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    unused: ClassVar[tuple[str, ...]] = ("steps", "grid", "rho")

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)

    def solve(self, problem: Problem, noise: Tensor) -> Tensor:
        def slope(log_time: Tensor, u: Tensor) -> Tensor:
            level = math.exp(-float(log_time))
            scale = math.sqrt(1 + level**2)
            return problem.x0_hat(scale * u, level) / scale - u / scale**2

        high, low = problem.levels[0], problem.levels[-1]
        span = torch.tensor([-math.log(high), -math.log(low)], dtype=noise.dtype)
        span = span.to(noise.device)
        options = {"norm": _largest_row, "first_step": _FIRST_STEP, "step_t": span[1:]}
        u = high / math.sqrt(1 + high**2) * noise
        u = dormand_prince(slope, u, span, self.rtol, self.atol, options)
        return problem.x0_hat(math.sqrt(1 + low**2) * u[-1], low)

    def evaluations(self, steps: int) -> None:
        return None


def _largest_row(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(dim=1).max().sqrt()
