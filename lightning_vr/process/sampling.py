"""How samples are drawn: a grid of noise levels, a solver that walks down it, and guidance.

The noise level s = sigma/alpha is the axis that all schedules share. A solver begins with noise at
the largest level of the grid; at the smallest its estimate x0_hat is the sample.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_vr.core.conditions import Condition, expanded, null_condition
from lightning_vr.core.devices import widest_float
from lightning_vr.core.progress import progress_steps
from lightning_vr.core.validation import (
    check_at_least,
    check_finite_number,
    check_fraction,
    check_instance,
    check_integer,
    check_positive,
)
from lightning_vr.process.grids import GridKind, check_grid, given, spaced
from lightning_vr.process.guidance import ConditionalDenoiser, Guidance
from lightning_vr.process.reverse_estimate import ReverseEstimate, ReverseEstimator
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.solvers import Heun, Problem, Solver
from lightning_vr.process.solvers.row_noise import NoiseKey, RowNoise
from lightning_vr.process.solvers.solver import Denoiser

USUAL_STEPS = 18


class Samples(NamedTuple):
    """Samples and what they cost.

    Attributes:
        x0: Samples ``(B, *)``.
        evaluations: Calls of the network for each sample, the most of all batches; a call on the
            doubled batch of guidance is one.
    """

    x0: Tensor
    evaluations: int


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    Attributes:
        solver: How to go from noise level to noise level; ``Heun()`` if not given.
        steps: Number of noise levels, from the largest to the smallest; 18 if not given.
        grid: ``"polynomial"`` is Karras et al.'s (equation 5), ``"exponential"`` has equal ratios
            of noise levels, so it is uniform in log SNR. Or the noise levels sigma/alpha
            themselves, decreasing, without the final 0.
        rho: Exponent of the polynomial grid; larger spends more steps at low noise.
        noise_level_min: Smallest noise level sigma/alpha; by default the schedule's.
        noise_level_max: Largest noise level; by default the schedule's, at most 1000.
        guidance: Scale of classifier-free guidance, 1 is none. It is the ``guidance_scale`` of
            diffusers, and 1 + w of Ho and Salimans (2022, 2207.12598).
        guidance_interval: Guidance acts at noise levels above the first and up to the second; at
            others the network is called with its condition alone (2404.07724). All if not given.
        guidance_rescale: Between 0 and 1: how far to move the contrast of guided estimates of x0
            back to that of the conditional ones (2305.08891, section 3.4).
    """

    solver: Solver | None = None
    steps: int | None = None
    grid: GridKind | list[float] = "polynomial"
    rho: float = 7.0
    noise_level_min: float | None = None
    noise_level_max: float | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.solver is not None:
            example = "an object, as DDIM(eta=0.5), or DiffusersSolver(scheduler) for a scheduler"
            check_instance("solver", self.solver, Solver, example)
        check_grid(self.grid)
        if self.steps is not None:
            check_integer("steps", self.steps, 2)
        check_positive("rho", self.rho)
        check_at_least("guidance", self.guidance, 0)
        check_finite_number("guidance", self.guidance)
        check_fraction("guidance_rescale", self.guidance_rescale)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise ValueError(
                    f"`guidance_interval` must be two noise levels 0 <= low < high, got "
                    f"{self.guidance_interval}: leave it out to guide at all levels."
                )
        self._check_unused()

    @property
    def evaluations(self) -> int | None:
        """Calls of the network for each sample; None if the solver finds out on the way."""
        return self._solver.evaluations(self.step_count)

    @property
    def step_count(self) -> int:
        """Number of noise levels, also where they are given or left out."""
        if not isinstance(self.grid, str):
            return len(self.grid)
        return USUAL_STEPS if self.steps is None else self.steps

    def noise_levels(self, schedule: Schedule) -> Tensor:
        """Return the decreasing grid ``(steps,)``, float64, without the final 0.

        Raises:
            ValueError: If the bounds are not 0 < min < max, or outside the schedule's, or if the
                solver has levels of its own that are not for this schedule.
        """
        own = self._solver.own_noise_levels(schedule, self.step_count)
        if own is not None:
            return own
        if not isinstance(self.grid, str):
            return given(self.grid, schedule)
        low, high = self.noise_level_min, self.noise_level_max
        return spaced(self.grid, self.step_count, self.rho, low, high, schedule)

    def solve(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        noise: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Turn standard normal ``noise (B, *)`` into samples ``(B, *)`` in one batch.

        Args:
            denoiser: Estimates x0 from x_t and t, in the dtype of ``noise``.
            schedule: The schedule that the denoiser was trained with.
            noise: Standard normal numbers.
            generator: Source of further noise, if the solver needs any; torch's global one if not
                given.
            progress: Whether to show a progress bar if sampling takes longer than a second.
        """
        size = max(len(noise), 1)
        return self.draw(
            lambda xt, t, group, cond: denoiser(xt, t),
            schedule,
            noise,
            generator=generator,
            batch_size=size,
            progress=progress,
        ).x0

    def draw(
        self,
        denoise: ConditionalDenoiser,
        schedule: Schedule,
        noise: Tensor,
        *,
        group: Tensor | None = None,
        cond: Condition | None = None,
        null_cond: Condition | Literal["zeros"] | None = None,
        reverse: ReverseEstimator | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> Samples:
        """Turn ``noise (B, *)`` into guided samples ``(B, *)``, batch by batch.

        A sample gets the same noise in any batch, so that it does not depend on ``batch_size`` but
        for rounding; with ``RK45`` for its tolerance.

        Args:
            denoise: Estimates x0 from x_t, t, class labels (negative is unconditional), condition.
            schedule: The schedule that it was trained with.
            noise: Standard normal numbers.
            group: Class labels ``(B,)``, or None.
            cond: Further condition, nested dictionaries of tensors of B rows or of one for all.
            null_cond: What stands for ``cond`` in the unconditional half of guidance, of one row,
                as ``null_condition`` takes it.
            reverse: Estimates the same, and the variance of reverse steps, for ``DDPM``.
            generator: Source of further noise, if the solver needs any; torch's global one if not
                given.
            batch_size: Number of samples at a time.
            progress: Whether to show a progress bar if sampling takes longer than a second.

        Raises:
            ValueError: If guidance has nothing to put in place of the condition.
        """
        check_integer("batch_size", batch_size, 1)
        null = self._null(cond, null_cond)
        cond, null = (None if x is None else expanded(x, len(noise)) for x in (cond, null))
        scale, interval, rescale = self.guidance, self.guidance_interval, self.guidance_rescale
        guided = Guidance(denoise, schedule, scale, interval, rescale, group, cond, null, reverse)
        count, key, steps = len(noise), NoiseKey(generator), self.step_count
        wide = widest_float(noise.device)  # rounding errors add up over the steps
        levels = tuple(self.noise_levels(schedule).tolist())
        known, starts = self.evaluations, range(0, count, batch_size)
        total = None if known is None else known * len(starts)

        parts, counts = [], [0]
        with progress_steps(total, "Sampling", is_shown=progress) as advance:
            for start in starts:
                rows = slice(start, min(start + batch_size, count))
                own = _Counted(guided.rows(rows), advance)
                row_noise = RowNoise(key, rows.start, rows.stop)
                problem = Problem(
                    own, schedule, steps, levels, row_noise, noise.dtype, own.estimate
                )
                parts.append(self._solver.solve(problem, noise[rows].to(wide)).to(noise.dtype))
                counts.append(own.count)
        return Samples(torch.cat(parts) if parts else noise, max(counts))

    @property
    def _solver(self) -> Solver:
        return self.solver or Heun()

    def _check_unused(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        if not isinstance(self.grid, str):
            for name in ("steps", "noise_level_min", "noise_level_max"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` must be left out where `grid` gives the noise levels, got "
                        f"{getattr(self, name)}: leave one of the two out."
                    )
        for name in self._solver.unused:
            value = getattr(self, name)
            if value != defaults[name]:
                raise ValueError(
                    f"`{name}` must be left out with {type(self._solver).__name__}, which chooses "
                    f"its own noise levels, got {value}: leave it out, or use another solver."
                )

    def _null(self, cond: Condition | None, null_cond: Any) -> Condition | None:
        """Return what stands for ``cond`` in the unconditional half, of one row, or None."""
        if self.guidance == 1 or cond is None:
            return None
        if null_cond is None:
            raise ValueError(
                f"`null_cond` must be given to leave out the condition {sorted(cond)} for guidance "
                f"{self.guidance:g}, got None: use 'zeros', what `encode_null` of a model returns, "
                f"or Sampler(guidance=1)."
            )
        return null_condition(null_cond, cond)


class _Counted:
    """A guided denoiser that counts its calls, and says after each that it is done."""

    def __init__(self, guided: Guidance, done: Any) -> None:
        self._guided, self._done = guided, done
        self.count = 0

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        found = self._guided(xt, t)
        self._note()
        return found

    def estimate(self, xt: Tensor, t: Tensor) -> ReverseEstimate:
        found = self._guided.estimate(xt, t)
        self._note()
        return found

    def _note(self) -> None:
        self.count += 1
        self._done()


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
