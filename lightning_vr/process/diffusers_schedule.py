"""The schedule of a diffusers scheduler, so that its networks train and sample unchanged.

Two families: a table of ``alphas_cumprod`` (DDPM and its relatives), the variance-preserving
process ``alpha² = alphas_cumprod`` at the timesteps ``0 .. steps - 1``, with log noise level
interpolated linearly between two of them; and flow matching, ``sigma = t / steps``, ``alpha = 1 -
sigma``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_vr.process.schedules import RectifiedFlow, Schedule
from lightning_vr.process.timesteps import Density, Uniform, UniformSteps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class DiffusersSchedule(Schedule):
    """alpha and sigma of a diffusers scheduler, in the scheduler's own timesteps.

    The velocity of a flow-matching scheduler is ``noise - x0``, as diffusers defines it: its
    derivatives are taken with respect to sigma, not to the timestep.

    Args:
        scheduler: A diffusers scheduler, for example ``DDPMScheduler()``.

    Raises:
        ValueError: If the scheduler is of neither family, or has zero terminal signal.
    """

    log_noise_level: Tensor

    def __init__(self, scheduler: "SchedulerMixin") -> None:
        super().__init__()
        self.scheduler = scheduler
        self.steps = int(cast(Any, scheduler).config.num_train_timesteps)
        self.is_flow = "FlowMatch" in type(scheduler).__name__
        table = torch.zeros(0) if self.is_flow else _log_noise_levels(scheduler)
        self.register_buffer("log_noise_level", table, persistent=False)
        flow = RectifiedFlow()
        self.t_min = self.steps * flow.t_min if self.is_flow else 0.0
        self.t_max = self.steps * flow.t_max if self.is_flow else self.steps - 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Follow the device but no change of precision: noise levels need more than 16 bits."""

        def move(x: Tensor) -> Tensor:
            found = fn(x)
            return found if found.dtype == x.dtype else x.to(found.device)

        return super()._apply(move, *args, **kwargs)  # type: ignore[no-untyped-call]

    def alpha(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return 1 - t / self.steps
        return torch.sigmoid(-2 * self._interpolate(t)).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return t / self.steps
        return torch.sigmoid(2 * self._interpolate(t)).sqrt().to(t.dtype)

    def alpha_derivative(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return -torch.ones_like(t)
        return -self._slope(t) * self.alpha(t) * self.sigma(t) ** 2

    def sigma_derivative(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return torch.ones_like(t)
        return self._slope(t) * self.sigma(t) * self.alpha(t) ** 2

    def time(self, noise_level: Tensor) -> Tensor:
        if self.is_flow:
            return self.steps / (1 + 1 / noise_level)
        table = self.log_noise_level.to(noise_level.device)
        level = torch.log(noise_level.double())
        above = torch.searchsorted(table, level).clamp(1, self.steps - 1)
        low, high = table[above - 1], table[above]
        time = above - 1 + ((level - low) / (high - low)).clamp(0, 1)
        return time.to(noise_level.dtype)

    def embedding_time(self, t: Tensor) -> Tensor:
        """Return ``t`` itself: the network was made for the scheduler's timesteps."""
        return t

    def default_timesteps(self) -> Density:
        return Uniform(self.t_min, self.t_max) if self.is_flow else UniformSteps(self.steps)

    def _below(self, t: Tensor) -> Tensor:
        return t.double().floor().long().clamp(0, self.steps - 2)

    def _interpolate(self, t: Tensor) -> Tensor:
        table, below = self.log_noise_level.to(t.device), self._below(t)
        return torch.lerp(table[below], table[below + 1], t.double() - below)

    def _slope(self, t: Tensor) -> Tensor:
        table, below = self.log_noise_level.to(t.device), self._below(t)
        return (table[below + 1] - table[below]).to(t.dtype)


def _log_noise_levels(scheduler: Any) -> Tensor:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"`scheduler` must have `alphas_cumprod` or be a flow-matching scheduler, got "
            f"{type(scheduler).__name__}: use EDM() or VE() instead."
        )
    kept = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64)
    if scheduler.config.get("rescale_betas_zero_snr") or bool((kept <= 0).any()):
        raise ValueError(
            f"`scheduler` must keep some signal at its last timestep, got alphas_cumprod of "
            f"{float(kept.min()):g}: set its `rescale_betas_zero_snr` to False."
        )
    return 0.5 * (torch.log1p(-kept) - torch.log(kept))
