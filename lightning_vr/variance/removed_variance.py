"""Target variance removed in training, read off the reference weights at no cost.

By the law of total variance ``E tr Cov[x0 | x_t, S] = V_DSM - V_STF`` in x0 space, at each noise
level. Draws are averaged over bins around a grid of noise levels in x0 space, where the mean
changes least within a bin, and converted at the bin's centre to the unit of ``variance.targets``.
"""

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_reduce_sum, rank, ranks_save_together


class RemovedVariance:
    """Sums of spreads by noise level, in float64 on the device of the draws, so that no step waits.

    Args:
        noise_levels: Centres of the bins ``(L,)``, evenly spaced in the logarithm.
        state: What ``state`` returned, to go on from there.
    """

    def __init__(self, noise_levels: Tensor, state: dict[str, Tensor] | None = None) -> None:
        half_step = (noise_levels[1] / noise_levels[0]).sqrt()
        self.noise_levels = noise_levels
        self._edges = torch.cat([noise_levels[:1] / half_step, noise_levels * half_step])
        self._sums = noise_levels.new_zeros(2, len(noise_levels))
        self._recent = noise_levels.new_zeros(2, len(noise_levels) + 2)
        if state is not None:
            self._sums = state["sums"]
            # every rank loads what rank 0 saved, and `means` sums over the ranks
            self._recent = state["recent"] if rank() == 0 else self._recent

    def to(self, device: torch.device) -> "RemovedVariance":
        """Move to the device of the draws."""
        dtype = widest_float(device)
        self._edges = self._edges.to(device, dtype)
        self._recent = self._recent.to(device, dtype)
        return self

    def add(self, noise_level: Tensor, spread: Tensor) -> None:
        """Add draws at ``noise_level (B,)`` with ``spread (B,)``.

        Any off the grid do not count, nor any that is not finite.
        """
        bins = torch.bucketize(noise_level.to(self._edges), self._edges)
        values = torch.stack([torch.ones_like(spread), spread])
        values = torch.where(spread.isfinite(), values, 0)
        self._recent.index_add_(1, bins, values.to(self._recent))

    def means(self) -> Tensor:
        """Return the mean removed at each noise level ``(L,)``, NaN where no draw fell.

        Over all ranks, which must all call it.
        """
        recent = all_reduce_sum(self._recent)
        self._recent = torch.zeros_like(recent)
        self._sums = self._sums + recent[:, 1:-1].cpu()
        count, total = self._sums[0], self._sums[1]
        return total / count / self.noise_levels**4

    def state(self) -> dict[str, Tensor]:
        """Return the sums of all ranks, on the CPU; all must call it."""
        recent = all_reduce_sum(self._recent) if ranks_save_together() else self._recent
        return {"sums": self._sums, "recent": recent.cpu().clone()}
