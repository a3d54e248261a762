"""Target variance removed in training, read off the reference weights at no cost.

By the law of total variance ``E tr Cov[x0 | x_t, S] = V_DSM - V_STF`` in x0 space, at each noise
level. Draws are averaged over bins around a grid of noise levels in x0 space, where the mean
changes least within a bin, and converted at the bin's centre to the unit of
``variance.target_measurement``.

Draws are added where they are, so that no step waits for the device. From time to time the ranks
add up what is recent and move it into the sums. A checkpoint holds both.
"""

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_reduce_sum, rank, ranks_save_together
from lightning_vr.core.validation import check_saved_tensor


class RemovedVariance:
    """Means of the target's spread by noise level.

    Args:
        noise_levels: Centres of the bins ``(L,)``, evenly spaced in the logarithm, float64.
        state: What ``state`` returned, to continue from there.
    """

    def __init__(self, noise_levels: Tensor, state: dict[str, Tensor] | None = None) -> None:
        self.noise_levels = noise_levels
        half_step = (noise_levels[1] / noise_levels[0]).sqrt()
        self._edges = torch.cat([noise_levels[:1] / half_step, noise_levels * half_step])
        # the outermost columns hold the draws off the grid
        self._sums = noise_levels.new_zeros(2, len(noise_levels) + 2)
        self._recent = torch.zeros_like(self._sums)
        if state is not None:
            for name in ("sums", "recent"):
                found = state.get(name) if isinstance(state, dict) else state
                check_saved_tensor(name, found, tuple(self._sums.shape))
            self._sums = state["sums"]
            # every rank loads what rank 0 saved, and the next reduction sums over the ranks
            self._recent = state["recent"] if rank() == 0 else self._recent

    def to(self, device: torch.device) -> None:
        """Move to the device of the draws."""
        dtype = widest_float(device)
        self._edges = self._edges.to(device, dtype)
        self._recent = self._recent.to(device, dtype)

    def add(self, noise_level: Tensor, spread: Tensor) -> None:
        """Add draws at ``noise_level (B,)`` with ``spread (B,)``.

        Draws off the grid do not count, nor do draws whose spread is not finite.
        """
        values = torch.stack([torch.ones_like(spread), spread])
        values = torch.where(spread.isfinite(), values, 0)
        bins = torch.bucketize(noise_level.to(self._edges), self._edges)
        self._recent.index_add_(1, bins, values.to(self._recent))

    def means(self) -> Tensor:
        """Return the mean removed at each noise level ``(L,)``, NaN where there was no draw.

        It is over all ranks, which must all call it.
        """
        recent = all_reduce_sum(self._recent)
        self._sums = self._sums + recent.to(self._sums)
        self._recent = torch.zeros_like(recent)
        on_grid = self._sums[:, 1:-1]
        return on_grid[1] / on_grid[0] / self.noise_levels**4

    def state(self) -> dict[str, Tensor]:
        """Return the sums of all ranks, on the CPU; all must call it."""
        recent = all_reduce_sum(self._recent) if ranks_save_together() else self._recent
        return {"sums": self._sums, "recent": recent.cpu().clone()}
