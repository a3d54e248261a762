"""DDIM with noise: a part of the noise that x_t holds is drawn anew in each step.

    z' = x0_hat + sqrt(s'² - u²) eps + u noise,    u = eta s' sqrt(1 - s'² / s²)

In alpha and sigma this is equation 12 of Song et al. 2021 (arXiv 2010.02502) with the standard
deviation of equation 16, ``alpha' u = eta sigma' / sigma sqrt(1 - alpha² / alpha'²)`` for a
variance-preserving process. At eta = 0 it is Euler's method. At eta = 1 it draws from the posterior
q(x_t' | x_t, x0_hat), as DDPM does (Ho et al. 2020, arXiv 2006.11239). In z and s it is also
Euler's method with ancestral noise, as k-diffusion and diffusers call it: their step to
``sqrt(s'² - u²)`` and the noise of u after it are the same formula.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_vr.core.validation import check_fraction
from lightning_vr.process.solvers.solver import Problem, StepSolver


def ancestral_std(eta: float, level: float, next_level: float) -> float:
    """Return the standard deviation u of the noise that is drawn anew."""
    return eta * next_level * math.sqrt(1 - (next_level / level) ** 2)


@dataclass(frozen=True)
class DDIM(StepSolver):
    """One evaluation of the network for each step; also known as Euler ancestral (eta = 1).

    Attributes:
        eta: Between 0, without noise, and 1, the noise of DDPM.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("eta", self.eta)

    def step(self, problem: Problem, z: Tensor, level: float, next_level: float) -> Tensor:
        x0 = problem.x0_hat(z, level)
        std = ancestral_std(self.eta, level, next_level)
        z = x0 + math.sqrt(next_level**2 - std**2) / level * (z - x0)
        return problem.add_noise(z, std) if std > 0 else z

    def evaluations(self, steps: int) -> int:
        return steps
