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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.rows import Rows
from lightning_vr.core.types import UNLABELLED
from lightning_vr.process.schedules import Schedule, expand

ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor | None, dict[str, Any] | None], Tensor]
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
    """

    denoise: ConditionalDenoiser
    schedule: Schedule
    scale: float
    interval: tuple[float, float] | None
    rescale: float
    group: Tensor | None
    cond: dict[str, Any] | None
    null_cond: dict[str, Any] | None

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        """Return x0_hat; all rows are at the same time."""
        if not self._acts(t):
            return self.denoise(xt, t, self.group, self.cond)
        group = self.group
        if group is not None:
            group = torch.cat([torch.full_like(group, UNLABELLED), group])
        cond = self.cond
        if cond is not None and self.null_cond is not None:
            cond = _joined(self.null_cond, cond)
        both = self.denoise(torch.cat([xt, xt]), torch.cat([t, t]), group, cond)
        unconditional, conditional = both.chunk(2)
        guided = torch.lerp(unconditional, conditional, self.scale)
        return rescaled(guided, conditional, self.rescale) if self.rescale > 0 else guided

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


def _joined(first: Rows, second: Rows) -> Rows:
    return {
        name: _joined(x, second[name]) if isinstance(x, dict) else torch.cat([x, second[name]])
        for name, x in first.items()
    }


def sized(cond: dict[str, Any], rows: slice, count: int) -> dict[str, Any]:
    """Return some rows of a nested condition that has ``count`` rows, or one for all of them."""
    found: dict[str, Any] = {}
    for name, x in cond.items():
        if isinstance(x, dict):
            found[name] = sized(x, rows, count)
        elif len(x) == 1 < count and isinstance(x, Tensor):
            found[name] = x.expand(len(range(count)[rows]), *x.shape[1:])
        else:
            found[name] = x[rows]
    return found


def check_null_cond(cond: dict[str, Any], null_cond: dict[str, Any], path: str = "") -> None:
    """Raise if a null condition is not made like the condition that it stands for.

    Raises:
        ValueError: If it has other names, or tensors of another shape.
    """
    if cond.keys() != null_cond.keys():
        raise ValueError(
            f"`null_cond{path}` must have the names of `cond{path}`, {sorted(cond)}, got "
            f"{sorted(null_cond)}: give one null for each."
        )
    for name, x in cond.items():
        null, place = null_cond[name], f"{path}[{name!r}]"
        if isinstance(x, dict) and isinstance(null, dict):
            check_null_cond(x, null, place)
        elif not (isinstance(x, Tensor) and isinstance(null, Tensor)):
            raise ValueError(
                f"`null_cond{place}` must be a tensor as `cond{place}` is, got "
                f"{type(null).__name__} and {type(x).__name__}: give tensors, or dictionaries of "
                f"them."
            )
        elif x.shape[1:] != null.shape[1:]:
            raise ValueError(
                f"`null_cond{place}` must have rows of shape {tuple(x.shape[1:])}, as `cond` has, "
                f"got {tuple(null.shape[1:])}: pad both to the same length."
            )
