"""Target variance removed in training, read off the reference weights at no cost.

By the law of total variance ``E tr Cov[x0 | x_t, S] = V_DSM - V_STF`` in x0 space, at each noise
level. Draws are averaged over bins around a grid of noise levels in x0 space, where the mean
changes least within a bin, and converted at the bin's centre to the unit of
``variance.target_measurement``.
"""

import torch
from torch import Tensor

from lightning_vr.variance.noise_level_sums import NoiseLevelSums


class RemovedVariance(NoiseLevelSums):
    """Means of the target's spread by noise level.

    Args:
        noise_levels: Centres of the bins ``(L,)``, evenly spaced in the logarithm.
        state: What ``state`` returned, to continue from there.
    """

    def __init__(self, noise_levels: Tensor, state: dict[str, Tensor] | None = None) -> None:
        half_step = (noise_levels[1] / noise_levels[0]).sqrt()
        edges = torch.cat([noise_levels[:1] / half_step, noise_levels * half_step])
        # the outermost columns hold the draws off the grid
        super().__init__(noise_levels, edges, 2, len(noise_levels) + 2, state)

    def add(self, noise_level: Tensor, spread: Tensor) -> None:
        """Add draws at ``noise_level (B,)`` with ``spread (B,)``.

        Draws off the grid do not count, nor do draws whose spread is not finite.
        """
        values = torch.stack([torch.ones_like(spread), spread])
        values = torch.where(spread.isfinite(), values, 0)
        self._recent.index_add_(1, self._bins(noise_level), values.to(self._recent))

    def means(self) -> Tensor:
        """Return the mean removed at each noise level ``(L,)``, NaN where there was no draw.

        It is over all ranks, which must all call it.
        """
        self._sums = self._sums + self._collect_recent()
        on_grid = self._sums[:, 1:-1]
        return on_grid[1] / on_grid[0] / self.noise_levels**4
