"""Ancestral sampling of the discrete reverse process, with its variance learned or fixed.

    x_(k-1) = c x0_hat + d x_k + sqrt(Sigma_k) noise

over K evenly spaced timesteps of a table, with the numbers of ``reverse_steps.py`` made for these K
(Nichol and Dhariwal 2021, arXiv 2102.09672, section 4). The last step returns its mean, x0_hat. A
learned variance is that at the timestep, interpolated between the beta and beta~ of the K steps.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lightning_vr.core.conditions import Condition, condition_rows, expanded
from lightning_vr.core.progress import progress_bar
from lightning_vr.core.validation import (
    check_at_least,
    check_choice,
    check_finite_number,
    check_integer,
)
from lightning_vr.process.reverse_estimate import (
    ReverseEstimate,
    ReverseEstimator,
    check_has_variance,
)
from lightning_vr.process.reverse_steps import ReverseSteps, Variance
from lightning_vr.process.schedules import Schedule, expand


@dataclass(frozen=True)
class AncestralSampler:
    """Samples by steps of the reverse process, for a ``DiffusersSchedule`` of a table.

    Attributes:
        steps: Number of timesteps, evenly spaced from the last to the first.
        variance: ``"learned"`` is the network's, ``"beta"`` and ``"beta_tilde"`` are the largest
            and the smallest that can be right.
        clip_sample: Whether estimates of x0 are clipped to [-1, 1], where pixels are. Networks for
            epsilon need it where the table ends in almost no signal.
        guidance: Scale of classifier-free guidance, 1 is none. It guides x0; the variance is that
            of the conditional pass.
    """

    steps: int = 25
    variance: Variance = "learned"
    clip_sample: bool = False
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 2)
        check_choice("variance", self.variance, get_args(Variance))
        check_at_least("guidance", self.guidance, 0)
        check_finite_number("guidance", self.guidance)

    def draw(
        self,
        estimate: ReverseEstimator,
        schedule: Schedule,
        noise: Tensor,
        *,
        source: torch.Generator | None = None,
        group: Tensor | None = None,
        cond: Condition | None = None,
        null_cond: Condition | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> Tensor:
        """Turn ``noise (B, *)`` into samples ``(B, *)``, which do not depend on ``batch_size``.

        Args:
            estimate: Estimates x0 and the variance from x_t, t, class labels (None is
                unconditional) and condition.
            schedule: The schedule that it was trained with.
            noise: Standard normal numbers.
            source: Source of further noise; torch's global one if not given.
            group: Class labels ``(B,)``, or None.
            cond: Further condition, one row per sample in each tensor, or None.
            null_cond: What stands for no condition, of one row, or None.
            batch_size: Number of samples at a time.
            progress: Whether to show a progress bar if sampling takes longer than a second.

        Raises:
            ValueError: If the schedule has no discrete steps, or too few, or if the network says
                nothing about the variance.
        """
        check_integer("batch_size", batch_size, 1)
        steps = ReverseSteps.of(schedule, self.steps)
        wide = torch.float32 if noise.device.type == "mps" else torch.float64

        def at(xt: Tensor, t: Tensor, rows: slice) -> ReverseEstimate:
            labels = None if group is None else group[rows]
            null = None if null_cond is None else expanded(null_cond, len(xt))
            return self._estimate(estimate, xt, t, labels, condition_rows(cond, rows), null)

        x = noise.to(wide)
        for k in progress_bar(range(self.steps - 1, -1, -1), "Sampling", is_shown=progress):
            starts, parts = range(0, len(x), batch_size), []
            for start in starts:
                rows = slice(start, start + batch_size)
                part = x[rows]
                number = torch.full((len(part),), k, device=x.device)
                step = steps.at(number, wide)
                xt, t = part.to(noise.dtype), step.timesteps.to(noise.dtype)
                parts.append(self._step(step, part, at(xt, t, rows)))
            if not parts:
                return noise
            mean, std = (torch.cat(each) for each in zip(*parts, strict=True))
            if k == 0:
                return mean.to(noise.dtype)
            fresh = torch.randn(x.shape, generator=source, device=x.device, dtype=noise.dtype)
            x = mean + std * fresh
        raise AssertionError("the first step returns")

    def _step(self, step: ReverseSteps, x: Tensor, found: ReverseEstimate) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the step from ``x (B, *)``."""
        x0 = found.x0.to(x.dtype)
        mean = expand(step.x0_scale, x) * x0 + expand(step.xt_scale, x) * x
        v = None if found.v is None else found.v.to(x.dtype)
        return mean, torch.exp(0.5 * step.log_variance(x, self.variance, v))

    def _estimate(
        self,
        estimate: ReverseEstimator,
        xt: Tensor,
        t: Tensor,
        group: Tensor | None,
        cond: Condition | None,
        null: Condition | None,
    ) -> ReverseEstimate:
        x0, v = found = estimate(xt, t, group, cond)
        if self.variance == "learned":
            check_has_variance(found)
        if self.guidance != 1 and not (group is None and null is None):
            plain = estimate(xt, t, None, cond if null is None else null)
            x0 = torch.lerp(plain.x0, x0, self.guidance)
        return ReverseEstimate(x0.clamp(-1, 1) if self.clip_sample else x0, v)
