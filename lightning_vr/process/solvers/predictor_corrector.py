"""Predictor and corrector: each step is followed by Langevin steps at the new noise level.

Song et al. 2021 (arXiv 2011.13456), algorithms 2 and 4. The predictor is the ancestral step,
``DDIM(eta=1)``. A Langevin step moves along the score ``-eps / s``,

    z' = z - h eps / s + sqrt(2 h) noise,    h = 2 (snr s)²

and leaves p(z; s) as it is, but for an error of order h. Song et al. take h = 2 (snr ‖noise‖ /
‖score‖)² with norms over a batch. Here the norms stand at their expectation under noise alone,
sqrt(d) and sqrt(d) / s, so that a sample depends neither on its neighbours nor its step on the
noise drawn.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_vr.core.validation import check_integer, check_positive
from lightning_vr.process.solvers.ddim import DDIM
from lightning_vr.process.solvers.solver import Problem, StepSolver


@dataclass(frozen=True)
class PredictorCorrector(StepSolver):
    """1 + ``corrector_steps`` evaluations of the network for each step, one for the last.

    Attributes:
        corrector_steps: Langevin steps at each noise level.
        snr: Size of a Langevin step, as the ratio of its drift to its noise.
    """

    corrector_steps: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        check_integer("corrector_steps", self.corrector_steps, 1)
        check_positive("snr", self.snr)
        if self.snr >= 1:
            raise ValueError(
                f"`snr` must be below 1, where Langevin steps diverge, got {self.snr}: use 0.16."
            )

    def step(self, problem: Problem, z: Tensor, level: float, next_level: float) -> Tensor:
        z = DDIM(eta=1.0).step(problem, z, level, next_level)
        if next_level == 0:
            return z
        size = 2 * (self.snr * next_level) ** 2
        for _ in range(self.corrector_steps):
            score = (problem.x0_hat(z, next_level) - z) / next_level**2
            z = problem.add_noise(z + size * score, math.sqrt(2 * size))
        return z

    def evaluations(self, steps: int) -> int:
        return steps + (steps - 1) * self.corrector_steps
