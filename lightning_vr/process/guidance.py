"""Classifier-free guidance: extrapolate from the unconditional to the conditional estimate.

    x0_hat = x0_u + guidance (x0_c - x0_u)

(Ho and Salimans 2022, arXiv 2207.12598). ``guidance`` is the ``guidance_scale`` of diffusers and
``1 + w`` of Ho and Salimans: 1 is the conditional network alone, 0 the unconditional one. x0_hat,
eps and velocity are affine in each other at a given x_t, so that it does not matter which of them
is extrapolated. Both estimates come from one call of the network on a doubled batch.

*Interval*: guidance harms at high noise and does nothing at low noise, so it may be limited to
noise levels in ``(low, high]``; outside the network is called with the condition alone
(Kynkäänniemi et al. 2024, arXiv 2404.07724).

*Rescaling*: a large guidance makes samples too contrasty. With the standard deviations of one
sample's values, Lin et al. 2023 (arXiv 2305.08891, equations 15 and 16) mix

    rescale · x0_hat std(x0_c) / std(x0_hat) + (1 - rescale) · x0_hat.

They, and diffusers, do this to what the network happens to predict. Here it is done in x0 space:
it is the sample that gets too much contrast, and the result is the same for each prediction type.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_vr.core.conditions import Condition, condition_rows
from lightning_vr.core.rows import concatenated
from lightning_vr.core.types import UNLABELLED
from lightning_vr.process.reverse_estimate import ReverseEstimate, ReverseEstimator
from lightning_vr.process.schedules import Schedule, expand

ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor | None, Condition | None], Tensor]
"""``(x_t, t, class labels or None, condition or None) -> x0_hat``."""

_ROUNDING = 1e-4
"""Relative error of a level that was a time in float32: one at a bound counts as the bound."""


@dataclass(frozen=True)
class Guidance:
    """A denoiser of some rows under guidance, called as ``(x_t (B, *), t (B,)) -> x0_hat``.

    Attributes:
        denoise: The conditional denoiser.
        schedule: Its schedule.
        scale: The guidance; 1 is none.
        interval: Noise levels above the first and up to the second at which it acts; all if None.
        rescale: Part of the result that gets the contrast of the conditional estimate.
        group: Class labels ``(B,)``, or None.
        cond: Further condition, a row for each sample, or None.
        null_cond: What stands for ``cond`` in the unconditional half, in the same form, or None.
        reverse: What the network says about reverse steps, for ``estimate``, or None.
    """

    denoise: ConditionalDenoiser
    schedule: Schedule
    scale: float
    interval: tuple[float, float] | None
    rescale: float
    group: Tensor | None
    cond: Condition | None
    null_cond: Condition | None
    reverse: ReverseEstimator | None = None

    def rows(self, index: slice) -> "Guidance":
        """Return the denoiser of some of the rows."""
        return replace(
            self,
            group=None if self.group is None else self.group[index],
            cond=condition_rows(self.cond, index),
            null_cond=condition_rows(self.null_cond, index),
        )

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        """Return x0_hat; all rows are at the same time."""
        return self._guided(lambda *given: ReverseEstimate(self.denoise(*given)), xt, t).x0

    def estimate(self, xt: Tensor, t: Tensor) -> ReverseEstimate:
        """Return x0_hat, and what the network says about the variance, given the condition."""
        if self.reverse is None:
            return ReverseEstimate(self(xt, t))
        return self._guided(self.reverse, xt, t)

    def _guided(self, estimate: ReverseEstimator, xt: Tensor, t: Tensor) -> ReverseEstimate:
        if not self._acts(t):
            return estimate(xt, t, self.group, self.cond)
        group = self.group
        if group is not None:
            group = torch.cat([torch.full_like(group, UNLABELLED), group])
        cond = self.cond
        if cond is not None and self.null_cond is not None:
            cond = concatenated([self.null_cond, cond])
        both = estimate(torch.cat([xt, xt]), torch.cat([t, t]), group, cond)
        unconditional, conditional = both.x0.chunk(2)
        guided = torch.lerp(unconditional, conditional, self.scale)
        if self.rescale > 0:
            guided = rescaled(guided, conditional, self.rescale)
        return ReverseEstimate(guided, None if both.v is None else both.v.chunk(2)[1])

    def _acts(self, t: Tensor) -> bool:
        if self.scale == 1 or (self.group is None and self.cond is None):
            return False
        if self.interval is None:
            return True
        low, high = ((1 + _ROUNDING) * bound for bound in self.interval)
        return low < float(self.schedule.noise_level(t[0].double())) <= high


def rescaled(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """Return ``guided (B, *)`` with its contrast moved towards that of ``conditional``."""
    std, wanted = (x.flatten(1).std(dim=1, correction=0) for x in (guided, conditional))
    # a sample of one value has no contrast to rescale
    ratio = torch.where(std > 0, wanted / std, 1.0)
    return guided * expand(1 + rescale * (ratio - 1), guided)
