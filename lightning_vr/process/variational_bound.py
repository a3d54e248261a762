"""The variational bound on the likelihood of data, in bits per dimension.

    -log p(x0) <= KL(q(x_(K-1) | x0) || N(0, 1)) + Σ_(k=1)^(K-1) KL_k - E log p(x0 | x_0),

where x_0 .. x_(K-1) are the noised samples at K timesteps of a table, KL_k is between the reverse
step given x0 and the model's, and the last term is that of the step to the data (Ho et al. 2020,
arXiv 2006.11239, equation 5; ``reverse_steps.py`` says which numbers, and which likelihood the last
term has). Each x_k is drawn once for each sample, which is unbiased, and all variances are computed
from the same calls of the network, so that their difference has less noise than each of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_vr.core.validation import check_choice, check_integer, check_samples
from lightning_vr.process.pixel_levels import check_levels, check_on_levels
from lightning_vr.process.reverse_estimate import ReverseEstimator, check_has_variance
from lightning_vr.process.reverse_steps import ReverseSteps, Variance
from lightning_vr.process.schedules import Schedule, expand


@dataclass(frozen=True)
class VariationalBound:
    """How the bound is computed.

    Attributes:
        steps: Number of timesteps, evenly spaced; all of the scheduler's if None. The fewer, the
            larger the bound.
        levels: Number of values that a pixel has in [-1, 1], 256 for 8 bits. By default the data
            is continuous, and its bits per dimension depend on its units and may be negative.
        clip_sample: Whether estimates of x0 are clipped to [-1, 1], where pixels are.
    """

    steps: int | None = None
    levels: int | None = None
    clip_sample: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_integer("steps", self.steps, 2)
        check_levels(self.levels)

    def bits_per_dimension(
        self,
        estimate: ReverseEstimator,
        schedule: Schedule,
        x0: Tensor,
        source: torch.Generator,
        *,
        variances: Sequence[Variance] = ("learned", "beta", "beta_tilde"),
        group: Tensor | None = None,
        cond: dict[str, Any] | None = None,
    ) -> dict[Variance, Tensor]:
        """Return the bound of each sample ``(B,)`` for each variance.

        Args:
            estimate: Estimates x0 and the variance from x_t, t, class labels and condition: the
                ``reverse_estimate`` of a model in evaluation mode.
            schedule: The schedule that it was trained with.
            x0: Clean samples ``(B, *)``.
            source: Generator of the noise, on the samples' device.
            variances: Variances of the reverse steps.
            group: Class labels ``(B,)``, or None.
            cond: Further condition, one row per sample in each value.

        Raises:
            ValueError: If the schedule has no discrete steps, if ``levels`` are given and the
                samples are no such pixels, or if the network says nothing about the variance.
        """
        terms = self.terms(
            estimate, schedule, x0, source, variances=variances, group=group, cond=cond
        )
        return {kind: found.sum(dim=1) for kind, found in terms.items()}

    @torch.no_grad()
    def terms(
        self,
        estimate: ReverseEstimator,
        schedule: Schedule,
        x0: Tensor,
        source: torch.Generator,
        *,
        variances: Sequence[Variance] = ("learned", "beta", "beta_tilde"),
        group: Tensor | None = None,
        cond: dict[str, Any] | None = None,
    ) -> dict[Variance, Tensor]:
        """Return the terms of the bound ``(B, K + 1)``; arguments as of ``bits_per_dimension``.

        They are in the order of the timesteps, the step to the data first; the divergence of the
        last x_k from noise follows.
        """
        check_samples("x0", x0)
        check_on_levels(x0, self.levels)
        for kind in variances:
            check_choice("variances", kind, get_args(Variance))
        steps = ReverseSteps.of(schedule, self.steps)
        wide = torch.float32 if x0.device.type == "mps" else torch.float64
        clean = x0.to(wide)
        parts: dict[Variance, list[Tensor]] = {kind: [] for kind in variances}
        for k in range(len(steps.timesteps)):
            step = steps.at(torch.full((len(x0),), k, device=x0.device), wide)
            noise = torch.randn(x0.shape, generator=source, device=x0.device, dtype=x0.dtype)
            xt = expand(step.alpha, clean) * clean + expand(step.sigma, clean) * noise
            found = estimate(xt.to(x0.dtype), step.timesteps.to(x0.dtype), group, cond)
            if "learned" in variances:
                check_has_variance(found)
            guess = found.x0.clamp(-1, 1) if self.clip_sample else found.x0
            error = expand(step.x0_scale, clean) * (clean - guess.to(wide))
            v = None if found.v is None else found.v.to(wide)
            for kind, terms in parts.items():
                terms.append(
                    step.bound(clean, error, step.log_variance(clean, kind, v), self.levels)
                )
        last = steps.at(torch.full((len(x0),), -1, device=x0.device), wide)
        prior = _prior(clean, last)
        return {kind: torch.stack([*terms, prior], dim=1) for kind, terms in parts.items()}


def _prior(x0: Tensor, last: ReverseSteps) -> Tensor:
    """Return the divergence of the last x_k given x0 from standard normal noise ``(B,)``."""
    mean, variance = expand(last.alpha, x0) * x0, expand(last.sigma, x0) ** 2
    nats = 0.5 * (variance - 1 - torch.log(variance) + mean**2)
    return nats.flatten(1).mean(dim=1) / math.log(2)
