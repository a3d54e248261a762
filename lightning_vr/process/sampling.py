"""Solvers of the probability-flow ODE in x0 space.

In ``z = x_t / alpha`` and ``s = sigma / alpha`` every schedule's ODE is ``dz/ds = (z - x0_hat) /
s`` (Song et al. 2021, arXiv 2011.13456, equation 13; Karras et al. 2022, arXiv 2206.00364, equation
4), and its right-hand side is the noise estimate ``eps = (x_t - alpha x0_hat) / sigma``. A step to
(alpha', sigma'), written without dividing by alpha, is

    Euler: x' = alpha' x0_hat + sigma' eps                               (DDIM)
    Heun:  x' = alpha' x0_hat + sigma' eps + (sigma' - alpha' s) (eps' - eps) / 2

with eps' at the end of the Euler step. For alpha = 1 Heun's is algorithm 1 of Karras et al. without
churn. The last step, to s = 0, returns x0_hat.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_vr.core.conditions import Condition, condition_rows, expanded
from lightning_vr.core.progress import progress_bar
from lightning_vr.core.validation import (
    check_at_least,
    check_choice,
    check_finite_number,
    check_integer,
    check_positive,
)
from lightning_vr.process.schedules import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x_t (B, *), t (B,)) -> x0_hat (B, *)``."""

ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor | None, dict[str, Any] | None], Tensor]
"""``(x_t, t, class labels or None, condition or None) -> x0_hat``."""

LARGEST_NOISE_LEVEL = 1000.0

_ROUNDING = 1e-4
"""Relative error of a bound that was copied from a table."""


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    Attributes:
        solver: ``"heun"`` takes 2·steps - 1 evaluations of the network, ``"euler"`` steps.
        steps: Number of noise levels, from the largest to the smallest.
        grid: ``"polynomial"`` is Karras et al.'s (equation 5), ``"exponential"`` has equal ratios.
        rho: Exponent of the polynomial grid; larger spends more steps at low noise.
        noise_level_min: Smallest noise level sigma/alpha; by default the schedule's.
        noise_level_max: Largest noise level; by default the schedule's, at most 1000.
        guidance: Scale of classifier-free guidance; 1 is none (Ho and Salimans 2022, 2207.12598).
    """

    solver: Literal["heun", "euler"] = "heun"
    steps: int = 18
    grid: Literal["polynomial", "exponential"] = "polynomial"
    rho: float = 7.0
    noise_level_min: float | None = None
    noise_level_max: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, ("heun", "euler"))
        check_choice("grid", self.grid, ("polynomial", "exponential"))
        check_integer("steps", self.steps, 2)
        check_positive("rho", self.rho)
        check_at_least("guidance", self.guidance, 0)
        check_finite_number("guidance", self.guidance)

    def noise_levels(self, schedule: Schedule) -> Tensor:
        """Return the decreasing grid ``(steps,)``, float64, without the final 0.

        Raises:
            ValueError: If the bounds are not 0 < min < max, or outside the schedule's.
        """
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        lowest, highest = (float(level) for level in schedule.noise_level(ends))
        low = lowest if self.noise_level_min is None else self.noise_level_min
        high = self.noise_level_max
        high = min(highest, LARGEST_NOISE_LEVEL) if high is None else high
        if not 0 < low < high:
            raise ValueError(
                f"`noise_level_min` and `noise_level_max` must satisfy 0 < min < max, "
                f"got {low:g} and {high:g}: leave one of them out, or change it."
            )
        if not lowest * (1 - _ROUNDING) <= low < high <= highest * (1 + _ROUNDING):
            raise ValueError(
                f"`noise_level_min` and `noise_level_max` must lie between {lowest:g} and "
                f"{highest:g}, the noise levels of {type(schedule).__name__}, got {low:g} and "
                f"{high:g}: leave them out, or widen the schedule."
            )
        ramp = torch.linspace(0, 1, self.steps, dtype=torch.float64)
        if self.grid == "exponential":
            return high * (low / high) ** ramp
        inverse = 1 / self.rho
        grid: Tensor = (high**inverse + ramp * (low**inverse - high**inverse)) ** self.rho
        return grid

    def solve(
        self, denoiser: Denoiser, schedule: Schedule, noise: Tensor, *, progress: bool = False
    ) -> Tensor:
        """Turn standard normal ``noise (B, *)`` into samples ``(B, *)``.

        The state is float64 where the device has it, because rounding errors add up over the
        steps; the denoiser gets the dtype of ``noise``.

        Args:
            denoiser: Estimates x0 from x_t and t.
            schedule: The schedule that the denoiser was trained with.
            noise: Standard normal numbers.
            progress: Whether to show a progress bar if sampling takes longer than a second.
        """
        wide = torch.float32 if noise.device.type == "mps" else torch.float64
        times = schedule.time(self.noise_levels(schedule).to(noise.device, wide))
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)

        def x0_and_noise(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            t = times[i].to(noise.dtype).expand(len(x))
            x0 = denoiser(x.to(noise.dtype), t).to(wide)
            return x0, (x - alpha[i] * x0) / sigma[i]

        x = sigma[0] * noise.to(wide)
        steps = range(self.steps - 1)
        for i in progress_bar(steps, "Sampling", is_shown=progress):
            x0, eps = x0_and_noise(x, i)
            x = alpha[i + 1] * x0 + sigma[i + 1] * eps
            if self.solver == "heun":
                _, next_eps = x0_and_noise(x, i + 1)
                step = sigma[i + 1] - alpha[i + 1] * sigma[i] / alpha[i]
                x = x + step * (next_eps - eps) / 2
        x0, _ = x0_and_noise(x, self.steps - 1)
        return x0.to(noise.dtype)

    def draw(
        self,
        denoise: ConditionalDenoiser,
        schedule: Schedule,
        noise: Tensor,
        *,
        group: Tensor | None = None,
        cond: Condition | None = None,
        null_cond: Condition | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> Tensor:
        """Turn ``noise (B, *)`` into guided samples ``(B, *)``, batch by batch.

        Args:
            denoise: Estimates x0 from x_t, t, class labels (None is unconditional), condition.
            schedule: The schedule that it was trained with.
            noise: Standard normal numbers.
            group: Class labels ``(B,)``, or None.
            cond: Further condition, one row per sample in each tensor, or None.
            null_cond: What stands for no condition, of one row, or None.
            batch_size: Number of samples at a time.
            progress: Whether to show a progress bar if sampling takes longer than a second.
        """
        check_integer("batch_size", batch_size, 1)
        parts = []
        for start in range(0, len(noise), batch_size):
            rows = slice(start, start + batch_size)
            labels = None if group is None else group[rows]
            some = condition_rows(cond, rows)
            null = None if null_cond is None else expanded(null_cond, len(noise[rows]))
            denoiser = self._guided(denoise, labels, some, null)
            parts.append(self.solve(denoiser, schedule, noise[rows], progress=progress))
        return torch.cat(parts) if parts else noise

    def _guided(
        self,
        denoise: ConditionalDenoiser,
        group: Tensor | None,
        cond: Condition | None,
        null: Condition | None,
    ) -> Denoiser:
        def denoiser(xt: Tensor, t: Tensor) -> Tensor:
            conditional = denoise(xt, t, group, cond)
            if self.guidance == 1 or (group is None and null is None):
                return conditional
            return torch.lerp(
                denoise(xt, t, None, cond if null is None else null), conditional, self.guidance
            )

        return denoiser


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in evaluation mode; restore the mode of each of its parts on leaving."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
