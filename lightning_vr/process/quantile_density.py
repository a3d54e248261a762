"""Densities over the quantiles of another density, as tables that are linear in each cell."""

import torch
from torch import Tensor

_INSIDE = 1e-9
"""Fraction of a cell at its edges without draws: rounding could move these to the next timestep."""

TINY = 1e-300
"""Keeps quotients of empty cells finite."""

_SHORT = 128
"""Largest number of cells that are summed by a matrix on the device, without a wait."""


class QuantileDensity:
    """A density h(v) on (0, 1), linear in each cell of a table.

    Args:
        edges: Edges of the n cells from 0 to 1 ``(n + 1,)``, float64.
        left: Height at the left end of each cell ``(n,)``, not negative; any scale.
        right: Height at the right end of each cell; that on the left if not given.
    """

    def __init__(self, edges: Tensor, left: Tensor, right: Tensor | None = None) -> None:
        right = left if right is None else right
        masses = 0.5 * edges.diff() * (left + right)
        total = masses.sum()
        self.edges, self.left, self.right = edges, left / total, right / total
        self._masses = masses / total
        cumulative = torch.cat([masses.new_zeros(1), _cumulated(masses)])
        self._cumulative = cumulative / cumulative[-1]

    @classmethod
    def histogram(cls, heights: Tensor) -> "QuantileDensity":
        """Return a density that is constant in cells of equal width, of any scale ``(n,)``."""
        edges = torch.linspace(0, 1, len(heights) + 1, dtype=torch.float64, device=heights.device)
        return cls(edges, heights)

    def icdf(self, u: Tensor) -> Tensor:
        """Map uniform ``u`` in (0, 1) to quantiles v, element by element."""
        cell = torch.searchsorted(self._cumulative, u, right=True) - 1
        cell = cell.clamp(0, len(self._masses) - 1)
        rest = (u - self._cumulative[cell]) / self._masses[cell]
        left, right = self.left[cell], self.right[cell]
        root = (left**2 + (right**2 - left**2) * rest).clamp(min=0).sqrt()
        fraction = rest * (left + right) / (left + root).clamp(min=TINY)
        fraction = fraction.clamp(_INSIDE, 1 - _INSIDE)
        return torch.lerp(self.edges[cell], self.edges[cell + 1], fraction)

    def __call__(self, v: Tensor) -> Tensor:
        """Return h at quantiles ``v``, which is q/p."""
        cell = (torch.searchsorted(self.edges, v, right=True) - 1).clamp(0, len(self.left) - 1)
        fraction = (v - self.edges[cell]) / (self.edges[cell + 1] - self.edges[cell])
        return torch.lerp(self.left[cell], self.right[cell], fraction)

    def cdf(self, v: Tensor) -> Tensor:
        """Return the integral of h from 0 to quantiles ``v``."""
        cell = (torch.searchsorted(self.edges, v, right=True) - 1).clamp(0, len(self.left) - 1)
        width = self.edges[cell + 1] - self.edges[cell]
        fraction = (v - self.edges[cell]) / width
        height = torch.lerp(self.left[cell], self.right[cell], fraction / 2)
        return self._cumulative[cell] + width * fraction * height

    def between(self, low: float, high: float) -> "QuantileDensity":
        """Return the density between two quantiles of p, over the quantiles of that part."""
        ends = self.edges.new_tensor([low, high])
        inner = self.edges[(self.edges > low) & (self.edges < high)]
        edges = torch.cat([ends[:1], inner, ends[1:]])
        cell = torch.searchsorted(self.edges, 0.5 * (edges[1:] + edges[:-1]), right=True) - 1
        start, width = self.edges[cell], self.edges[cell + 1] - self.edges[cell]
        left, right = (
            torch.lerp(self.left[cell], self.right[cell], (x - start) / width)
            for x in (edges[:-1], edges[1:])
        )
        # a part with density 0 has no weighted loss, and any draws of it estimate that
        is_empty = (left + right).sum() <= 0
        left, right = (torch.where(is_empty, 1.0, x) for x in (left, right))
        return QuantileDensity((edges - low) / (high - low), left, right)


def _cumulated(masses: Tensor) -> Tensor:
    """Return cumulative sums, by operations that ``deterministic=True`` allows on a GPU."""
    if len(masses) > _SHORT:
        return masses.cpu().cumsum(0).to(masses.device)
    return masses.expand(len(masses), -1).tril().sum(dim=1)
