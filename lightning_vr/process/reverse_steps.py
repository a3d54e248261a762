r"""The reverse process of K discrete steps, with a variance of each step that may be learned.

A variance-preserving table has ``a_t = alpha_t²`` at its timesteps, and K of them make a process of
their own with ``beta_k = 1 - a_k / a_(k-1)``, where ``a_(-1) = 1`` (Nichol and Dhariwal 2021, arXiv
2102.09672, equation 19). Given x0 the step back is normal (Ho et al. 2020, arXiv 2006.11239,
equations 6 and 7):

    q(x_(k-1) | x_k, x0) = N(c x0 + d x_k, beta~_k),      c = sqrt(a_(k-1)) beta_k / (1 - a_k),
    beta~_k = beta_k (1 - a_(k-1)) / (1 - a_k),           d = sqrt(1 - beta_k) beta~_k / beta_k,

and the model's is that with its x0_hat for x0 and a variance of its own. The best one is ``beta~_k
+ c² Cov(x0 | x_k)`` (Bao et al. 2022, arXiv 2201.06503, theorem 1, for one number for each step).
It is beta~ for data of one point and beta for normal data of unit variance, and lies between for
data of a variance up to 1, so that a network interpolates between their logarithms (Nichol and
Dhariwal, equation 15):

    log Sigma = f log beta + (1 - f) log beta~,      f = (v + 1) / 2,

with v the second half of its output, not clamped. At the first step, k = 0, beta~ is 0; as usual
beta~_1 stands for it, and for beta_0 too where the variance is fixed.

The terms of the variational bound are exact: between normal distributions for k > 0, and
``-log p(x0 | x_0)`` at the first step, either the normal *density*, for continuous data, or for
pixels of ``levels`` values in [-1, 1] its *integral* over the bin of each, where the outer bins
reach to infinity (Ho et al. 2020, equation 13).
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_vr.core.validation import check_integer
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.schedules import expand

Variance = Literal["learned", "beta", "beta_tilde"]
"""The variance of a reverse step: the network's, or a fixed one."""


@dataclass(frozen=True)
class ReverseSteps:
    """Numbers of each step from a timestep to the one before it; the first leads to the data.

    Attributes:
        timesteps: Timesteps of the schedule ``(K,)``, increasing.
        alpha: Scale of the sample ``(K,)``.
        sigma: Scale of the noise ``(K,)``.
        log_beta: Logarithm of beta ``(K,)``.
        log_beta_tilde: Logarithm of beta~ ``(K,)``; in the first step that of the second.
        x0_scale: Factor c on x0 in the mean ``(K,)``; 1 in the first step.
        xt_scale: Factor d on x_t in the mean ``(K,)``; 0 in the first step.
        is_first: Whether it is the step to the data ``(K,)``.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    log_beta: Tensor
    log_beta_tilde: Tensor
    x0_scale: Tensor
    xt_scale: Tensor
    is_first: Tensor

    @classmethod
    def of(cls, schedule: Any, count: int | None = None) -> "ReverseSteps":
        """Return ``count`` steps over evenly spaced timesteps of a schedule, in float64.

        Args:
            schedule: A ``DiffusersSchedule`` of a table.
            count: Number of steps K; all if None.

        Raises:
            ValueError: If the schedule has no discrete steps, or fewer.
        """
        check_discrete(schedule)
        count = schedule.steps if count is None else count
        check_integer("steps", count, 2)
        if count > schedule.steps:
            raise ValueError(
                f"`steps` must be at most {schedule.steps}, the timesteps of the scheduler, got "
                f"{count}: use fewer."
            )
        level = schedule.log_noise_level
        ends = torch.linspace(0, schedule.steps - 1, count, dtype=level.dtype, device=level.device)
        timesteps = ends.round()
        level = level[timesteps.long()]
        log_a, a_noise = -softplus(2 * level), torch.sigmoid(2 * level)
        # of the step before: the data itself has no noise
        log_before = torch.cat([torch.zeros_like(log_a[:1]), log_a[:-1]])
        noise_before = torch.cat([torch.zeros_like(a_noise[:1]), a_noise[:-1]])
        beta = -torch.expm1(log_a - log_before)
        beta_tilde = beta * noise_before / a_noise
        return cls(
            timesteps,
            torch.exp(log_a / 2),
            a_noise.sqrt(),
            torch.log(beta),
            torch.log(torch.cat([beta_tilde[1:2], beta_tilde[1:]])),
            torch.exp(log_before / 2) * beta / a_noise,
            torch.sqrt(1 - beta) * noise_before / a_noise,
            timesteps == timesteps[0],
        )

    def at(self, number: Tensor, dtype: torch.dtype) -> "ReverseSteps":
        """Return the steps of the given numbers ``(B,)``, on their device and in another dtype."""
        parts = (getattr(self, field.name).to(number.device)[number] for field in fields(self))
        return ReverseSteps(*(x if x.dtype == torch.bool else x.to(dtype) for x in parts))

    def mean(self, x0: Tensor, xt: Tensor) -> Tensor:
        """Return the mean of the step from ``xt (K, *)`` given x0, of one step each."""
        return expand(self.x0_scale, x0) * x0 + expand(self.xt_scale, xt) * xt

    def log_variance(self, like: Tensor, kind: Variance, v: Tensor | None = None) -> Tensor:
        """Return the logarithm of the variance of each number, in the shape of ``like (K, *)``.

        Args:
            like: Samples of one step each.
            kind: Which variance.
            v: What the network says about it ``(K, *)``, for the learned one.
        """
        beta, beta_tilde = expand(self.log_beta, like), expand(self.log_beta_tilde, like)
        if kind == "learned":
            assert v is not None, "its caller has checked that the network has a variance"
            return torch.lerp(beta_tilde.expand_as(v), beta.expand_as(v), (v + 1) / 2)
        if kind == "beta_tilde":
            return beta_tilde.expand_as(like)
        return torch.where(expand(self.is_first, like), beta_tilde, beta).expand_as(like)

    def bound(self, x0: Tensor, error: Tensor, log_variance: Tensor, levels: int | None) -> Tensor:
        """Return the term of the bound of each step in bits per dimension, ``(K,)``.

        Args:
            x0: Clean samples ``(K, *)``.
            error: Mean of the step given x0, less that of the model ``(K, *)``.
            log_variance: Logarithm of the model's variance ``(K, *)``.
            levels: Number of values of a pixel in [-1, 1]; None for continuous data.
        """
        true = expand(self.log_beta_tilde, x0)
        divergence = gaussian_divergence(error, true, log_variance)
        is_first = expand(self.is_first, x0)
        # numbers of other steps would be too far out for the integral, and make its gradient NaN
        error, log_variance = (torch.where(is_first, x, 0) for x in (error, log_variance))
        nll = data_nll(x0, x0 - error, log_variance, levels)
        nats = torch.where(is_first, nll, divergence)
        return nats.flatten(1).mean(dim=1) / math.log(2)


def gaussian_divergence(difference: Tensor, log_true: Tensor, log_model: Tensor) -> Tensor:
    """Return KL(true || model) of normal distributions, number by number, in nats.

    Args:
        difference: Difference of the means.
        log_true: Logarithm of the variance of the first.
        log_model: Logarithm of the variance of the second.
    """
    gap = log_true - log_model
    return 0.5 * (torch.expm1(gap) - gap + difference**2 * torch.exp(-log_model))


def data_nll(x0: Tensor, mean: Tensor, log_variance: Tensor, levels: int | None) -> Tensor:
    """Return ``-log p(x0)`` of each number in nats: of its density, or of its bin of ``levels``."""
    if levels is None:
        squares = (x0 - mean) ** 2 * torch.exp(-log_variance)
        return 0.5 * (squares + log_variance + math.log(2 * math.pi))
    half = 1 / (levels - 1)
    scale = torch.exp(-0.5 * log_variance)
    low, high = ((x0 + side * half - mean) * scale for side in (-1, 1))
    # in the left tail, where logarithms of the distribution function have all digits
    flip = low + high > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    inner = log_b + torch.log(-torch.expm1(log_a - log_b))
    at_top, at_bottom = x0 > 1 - half, x0 < -1 + half
    found = torch.where(at_top, torch.special.log_ndtr(-low), inner)
    return -torch.where(at_bottom, torch.special.log_ndtr(high), found)


def check_discrete(schedule: Any) -> None:
    """Raise if a schedule has no table of discrete steps.

    Raises:
        ValueError: If it is continuous or a flow.
    """
    if is_discrete(schedule):
        return
    name = type(getattr(schedule, "scheduler", schedule)).__name__
    raise ValueError(
        f"`schedule` must be a table of timesteps for the variance of reverse steps, whose bounds "
        f"beta and beta~ depend on where each step ends, got {name}, which has no steps: use "
        f"DiffusersSchedule(DDPMScheduler())."
    )


def is_discrete(schedule: Any) -> bool:
    """Return whether a schedule has a table of discrete steps."""
    return isinstance(schedule, DiffusersSchedule) and not schedule.is_flow
