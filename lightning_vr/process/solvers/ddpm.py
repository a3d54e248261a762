"""DDPM: steps of the discrete reverse process, with a variance that is learned or fixed.

    x_(k-1) = c x0_hat + d x_k + sqrt(Sigma_k) noise

over K evenly spaced timesteps of a table, with the numbers of ``reverse_steps.py`` made for these K
(Nichol and Dhariwal 2021, arXiv 2102.09672, section 4). The last step returns its mean, x0_hat. A
learned variance is that at the timestep, interpolated between the beta and beta~ of the K steps;
under guidance it is that of the conditional half. With beta~ it would be ``DDIM(eta=1)`` on the
same timesteps.
"""

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from lightning_vr.core.validation import check_choice
from lightning_vr.process.reverse_estimate import check_has_variance
from lightning_vr.process.reverse_steps import ReverseSteps, Variance
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.solvers.solver import Problem, Solver


@dataclass(frozen=True)
class DDPM(Solver):
    """One evaluation of the network for each step, for a ``DiffusersSchedule`` of a table.

    Attributes:
        variance: ``"learned"`` is that of a network trained with ``LearnedVariance``. ``"beta"``
            is right for normal data of unit variance, ``"beta_tilde"`` for data of one point.
        clip_sample: Whether estimates of x0 are clipped to [-1, 1], where pixels are. Networks for
            epsilon need it where the table ends in almost no signal.
    """

    variance: Variance = "learned"
    clip_sample: bool = False
    unused: ClassVar[tuple[str, ...]] = ("grid", "rho", "noise_level_min", "noise_level_max")

    def __post_init__(self) -> None:
        check_choice("variance", self.variance, get_args(Variance))

    def evaluations(self, steps: int) -> int:
        return steps

    def own_noise_levels(self, schedule: Schedule, steps: int) -> Tensor:
        """Return the noise levels of the timesteps.

        Raises:
            ValueError: If the schedule has no discrete steps, or fewer.
        """
        found = ReverseSteps.of(schedule, steps)
        return (found.sigma / found.alpha).flip(0).cpu()

    def solve(self, problem: Problem, noise: Tensor) -> Tensor:
        steps, x = ReverseSteps.of(problem.schedule, problem.steps), noise
        for k in range(problem.steps - 1, -1, -1):
            number = torch.full((len(x),), k, device=x.device)
            step = steps.at(number, x.dtype)
            found = problem.estimate(x.to(problem.dtype), step.timesteps.to(problem.dtype))
            if self.variance == "learned":
                check_has_variance(found)
            x0 = found.x0.to(x.dtype)
            x0 = x0.clamp(-1, 1) if self.clip_sample else x0
            mean = step.mean(x0, x)
            if k == 0:
                return mean
            v = None if found.v is None else found.v.to(x.dtype)
            std = torch.exp(0.5 * step.log_variance(x, self.variance, v))
            x = mean + std * problem.noise.like(x)
        raise AssertionError("the first step returns")
