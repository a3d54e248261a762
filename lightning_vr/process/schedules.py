"""Noise schedules: ``x_t = alpha(t) x_0 + sigma(t) noise``, noise ~ N(0, I).

The noise level ``s = sigma / alpha`` is the axis that all schedules share: in ``z = x_t / alpha``
every one of them is the variance-exploding process at s, so targets, solvers and plots are written
once. Derivatives are needed by the velocity prediction ``alpha' x_0 + sigma' noise``.

Sources: VE and VP, Song et al. 2021, arXiv 2011.13456, equations 30 and 32; EDM, Karras et al.
2022, arXiv 2206.00364; cosine, Nichol and Dhariwal 2021, arXiv 2102.09672, in the form
``alpha = cos(pi t / 2)`` of Salimans and Ho 2022, arXiv 2202.00512; rectified flow, Liu et al.
2022, arXiv 2209.03003.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr.core.validation import check_positive
from lightning_vr.process.timesteps import Density, LogNormal, Uniform


class Schedule(nn.Module, ABC):
    """``alpha(t)`` and ``sigma(t)`` for ``t_min <= t <= t_max``, and what follows from them.

    All methods work element by element on tensors of any shape and keep their dtype. Where a
    schedule is an argument, a diffusers scheduler may be given too (``as_schedule`` wraps it).
    """

    t_min: float
    t_max: float

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        """Let configurations name a diffusers scheduler where a schedule is an argument."""
        return (cls is Schedule and is_diffusers_scheduler(other)) or NotImplemented

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the scale of the sample at ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the scale of the noise at ``t``."""

    @abstractmethod
    def alpha_derivative(self, t: Tensor) -> Tensor:
        """Return d alpha / dt."""

    @abstractmethod
    def sigma_derivative(self, t: Tensor) -> Tensor:
        """Return d sigma / dt."""

    @abstractmethod
    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time at which ``sigma / alpha`` is ``noise_level``."""

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at ``t``."""
        return self.alpha(t), self.sigma(t)

    def noise_level(self, t: Tensor) -> Tensor:
        """Return ``sigma / alpha``; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def perturb(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return ``alpha(t) x0 + sigma(t) noise`` for ``x0, noise (B, *)`` and ``t (B,)``."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def embedding_time(self, t: Tensor) -> Tensor:
        """Return the time that networks get, in the range up to a thousand that they expect."""
        return 1000.0 * t

    def default_timesteps(self) -> Density:
        """Return the density of t that this schedule is usually trained with."""
        return Uniform(self.t_min, self.t_max)

    def check_prediction(self, prediction: str) -> None:
        """Raise if networks of this schedule cannot be trained for a prediction type."""


class EDM(Schedule):
    """alpha = 1, sigma = t; trained with log-normal noise levels (arXiv 2206.00364).

    Args:
        sigma_min: Smallest noise level of sampling.
        sigma_max: Largest noise level of sampling.
        embedding_scale: Factor on ``log(sigma) / 4``, c_noise of table 1, which networks embed.
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, embedding_scale: float = 1000.0
    ) -> None:
        super().__init__()
        _check_range("sigma_min", sigma_min, "sigma_max", sigma_max)
        check_positive("embedding_scale", embedding_scale)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.embedding_scale = embedding_scale
        self.t_min, self.t_max = sigma_min, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, noise_level: Tensor) -> Tensor:
        return noise_level

    def embedding_time(self, t: Tensor) -> Tensor:
        """Return ``embedding_scale * log(t) / 4``."""
        return 0.25 * self.embedding_scale * torch.log(t)

    def default_timesteps(self) -> Density:
        return LogNormal(-1.2, 1.2)


class VE(Schedule):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    Args:
        sigma_min: Noise level at t = 0.
        sigma_max: Noise level at t = 1.
    """

    t_min, t_max = 0.0, 1.0

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__()
        _check_range("sigma_min", sigma_min, "sigma_max", sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_max / self.sigma_min) * self.sigma(t)

    def time(self, noise_level: Tensor) -> Tensor:
        return torch.log(noise_level / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


class VP(Schedule):
    """Variance preserving with linear beta: log alpha = -t² (beta_max - beta_min)/4 - t beta_min/2.

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.
    """

    t_min, t_max = 1e-5, 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__()
        _check_range("beta_min", beta_min, "beta_max", beta_max)
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        # numbers first: each product with a tensor is a call of torch
        return -0.25 * (self.beta_max - self.beta_min) * (t * t) - 0.5 * self.beta_min * t

    def _log_alpha_derivative(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return self._log_alpha_derivative(t) * self.alpha(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return -self._log_alpha_derivative(t) * self.alpha(t) ** 2 / self.sigma(t)

    def time(self, noise_level: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        log_variance = torch.log1p(noise_level**2)
        root = torch.sqrt(self.beta_min**2 + 2 * slope * log_variance)
        return 2 * log_variance / (root + self.beta_min)


class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Args:
        t_min: Smallest time, above 0.
        t_max: Largest time, below 1.
    """

    def __init__(self, t_min: float = 1e-3, t_max: float = 0.999) -> None:
        super().__init__()
        _check_range("t_min", t_min, "t_max", t_max, at_most=1.0)
        self.t_min, self.t_max = t_min, t_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1 - t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.sigma(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)

    def time(self, noise_level: Tensor) -> Tensor:
        return torch.atan(noise_level) * (2 / math.pi)


class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t: t = 0 is data, t = 1 is noise.

    Args:
        t_min: Smallest time, above 0.
        t_max: Largest time, at most 1.
    """

    def __init__(self, t_min: float = 1e-3, t_max: float = 0.999) -> None:
        super().__init__()
        _check_range("t_min", t_min, "t_max", t_max, at_most=1.0)
        self.t_min, self.t_max = t_min, t_max

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, noise_level: Tensor) -> Tensor:
        return 1 / (1 + 1 / noise_level)


class KnownScales:
    """A schedule for a function that asks for scales which are known at some times.

    Args:
        schedule: The schedule; what is not known is asked of it.
        t: The times ``(B,)``.
        scales: Its alpha and sigma there.
    """

    def __init__(self, schedule: Schedule, t: Tensor, scales: tuple[Tensor, Tensor]) -> None:
        self._schedule, self._t, self._scales = schedule, t, scales

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._scales if t is self._t else self._schedule.scales(t)

    def alpha(self, t: Tensor) -> Tensor:
        return self._scales[0] if t is self._t else self._schedule.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._scales[1] if t is self._t else self._schedule.sigma(t)

    def noise_level(self, t: Tensor) -> Tensor:
        if t is not self._t:
            return self._schedule.noise_level(t)
        alpha, sigma = self._scales
        return sigma / alpha


def is_diffusers_scheduler(kind: type) -> bool:
    """Return whether a class is one of diffusers' schedulers, without an import of diffusers."""
    return any(
        base.__name__ == "SchedulerMixin" and base.__module__.startswith("diffusers.")
        for base in kind.__mro__
    )


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Give ``coefficient (B,)`` the trailing axes of ``x (B, *)``."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def _check_range(
    low_name: str, low: float, high_name: str, high: float, at_most: float = math.inf
) -> None:
    if not 0 < low < high <= at_most or high == math.inf:
        bound = " < inf" if at_most == math.inf else f" <= {at_most}"
        raise ValueError(
            f"`{low_name}` and `{high_name}` must satisfy 0 < {low_name} < {high_name}{bound}, "
            f"got {low} and {high}: change one of them."
        )
