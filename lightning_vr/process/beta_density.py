"""Beta-distributed times: more draws at both ends, in the middle, or towards one end.

``p(t) = t^(a-1) (1-t)^(b-1) / B(a, b)`` has no inverse CDF in closed form. Its integral is
tabulated in x = logit t, where it is smooth for every a and b: ``dF/dx = t^a (1-t)^b / B(a, b)``.
Between the nodes F is the cubic that has these slopes at both ends (Hermite), accurate to
about 1e-12, and monotone; the inverse solves it by bisection and Newton's method.

Source: Beta-tuned timesteps, ECCV 2024, whose parameters could not be read here; diffusers and
OneTrainer (pull request 1225) offer such times.
"""

import math

import numpy
import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.validation import check_positive
from lightning_vr.process.timesteps import Density

_NODES = 8192
_TAIL = 41.0
"""exp(-41) is 2e-18: what lies beyond the table, below the resolution of float64."""

_NARROW = 80.0
"""Largest logit: beyond it t would be 0 in float32."""

_GAUSS_POINTS = 8
_BISECTIONS = 6
_NEWTON_STEPS = 4


class Beta(Density):
    """t from the beta distribution on ``(0, end)``. It changes the objective.

    Args:
        a: Exponent at 0: above 1 few times are near it, below 1 many.
        b: Exponent at ``end``.
        end: Largest time; 1000 for most schedulers of diffusers.
    """

    changes_objective = True

    def __init__(self, a: float, b: float, end: float = 1.0) -> None:
        super().__init__()
        for name, value in (("a", a), ("b", b), ("end", end)):
            check_positive(name, value)
        self.a, self.b, self.end = a, b, end
        self._log_norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        self._nodes, self._values = self._tabulated()

    def icdf(self, u: Tensor) -> Tensor:
        x, values, slopes = self._table(u.device)
        u_wide = u.to(x)
        cell = (torch.searchsorted(values, u_wide, right=True) - 1).clamp(0, len(x) - 2)
        low, high = torch.zeros_like(u_wide), torch.ones_like(u_wide)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_below = _hermite(middle, cell, x, values, slopes)[0] < u_wide
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        share = (low + high) / 2
        for _ in range(_NEWTON_STEPS):
            value, slope = _hermite(share, cell, x, values, slopes)
            share = (share - (value - u_wide) / slope.clamp(min=1e-300)).clamp(low, high)
        return (self.end * torch.sigmoid(torch.lerp(x[cell], x[cell + 1], share))).to(u.dtype)

    def cdf(self, t: Tensor) -> Tensor:
        x, values, slopes = self._table(t.device)
        at = torch.logit((t.to(x) / self.end).clamp(0, 1)).clamp(x[0], x[-1])
        cell = (torch.searchsorted(x, at, right=True) - 1).clamp(0, len(x) - 2)
        share = (at - x[cell]) / (x[cell + 1] - x[cell])
        return _hermite(share, cell, x, values, slopes)[0].clamp(0, 1).to(t.dtype)

    def log_prob(self, t: Tensor) -> Tensor:
        x = t / self.end
        density = (self.a - 1) * torch.log(x) + (self.b - 1) * torch.log1p(-x)
        density = density - self._log_norm - math.log(self.end)
        return torch.where((x > 0) & (x < 1), density, -math.inf)

    def _slope(self, x: Tensor) -> Tensor:
        """Return dF/dx at logits x."""
        log_t, log_rest = -torch.nn.functional.softplus(-x), -torch.nn.functional.softplus(x)
        return torch.exp(self.a * log_t + self.b * log_rest - self._log_norm)

    def _tabulated(self) -> tuple[Tensor, Tensor]:
        """Return logits from one tail to the other and F at each ``(nodes,)``."""
        # in the tails F is t^a / (a B), so dF/dx / a, and 1 - F is (1 - t)^b / (b B)
        low, high = ((-_TAIL + math.log(each) + self._log_norm) / each for each in (self.a, self.b))
        ends = (max(min(low, -1.0), -_NARROW), min(max(-high, 1.0), _NARROW))
        x = torch.linspace(*ends, _NODES, dtype=torch.float64)
        points, weights = (
            torch.from_numpy(each) for each in numpy.polynomial.legendre.leggauss(_GAUSS_POINTS)
        )
        half = 0.5 * x.diff()[:, None]
        inside = (half * weights * self._slope(x[:-1, None] + half * (points + 1))).sum(dim=1)
        before, after = self._slope(x[0]) / self.a, self._slope(x[-1]) / self.b
        values = before + torch.cat([x.new_zeros(1), inside.cumsum(0)])
        return x, values / (values[-1] + after)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        dtype = widest_float(device)
        x = self._nodes.to(device, dtype)
        return x, self._values.to(device, dtype), self._slope(x)


def _hermite(
    share: Tensor, cell: Tensor, x: Tensor, values: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cubic in a cell at a fraction of its width, and its derivative in the fraction."""
    width, rise = x[cell + 1] - x[cell], values[cell + 1] - values[cell]
    left, right = width * slopes[cell], width * slopes[cell + 1]
    bend, twist = 3 * rise - 2 * left - right, left + right - 2 * rise
    value = values[cell] + share * (left + share * (bend + share * twist))
    return value, left + share * (2 * bend + 3 * share * twist)
