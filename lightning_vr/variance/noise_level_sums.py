"""Sums over the draws of training by noise level, on the device of the draws.

Draws are added where they are, so that no step waits for the device. From time to time the ranks
add up what is recent and move it into the sums. A checkpoint holds both.
"""

from typing import TypeVar

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_reduce_sum, rank, ranks_save_together
from lightning_vr.core.validation import check_saved_tensor

_Sums = TypeVar("_Sums", bound="NoiseLevelSums")


class NoiseLevelSums:
    """Sums of several numbers of each draw, in bins of the noise level.

    Args:
        noise_levels: The noise level that each bin is shown at ``(L,)``, float64.
        edges: Where one bin ends and the next begins, in increasing order.
        rows: How many numbers are summed.
        columns: How many sums there are of each.
        state: What ``state`` returned, to continue from there.
    """

    def __init__(
        self,
        noise_levels: Tensor,
        edges: Tensor,
        rows: int,
        columns: int,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.noise_levels = noise_levels
        self._edges = edges
        self._sums = noise_levels.new_zeros(rows, columns)
        self._recent = torch.zeros_like(self._sums)
        if state is not None:
            for name in ("sums", "recent"):
                found = state.get(name) if isinstance(state, dict) else state
                check_saved_tensor(name, found, tuple(self._sums.shape))
            self._sums = state["sums"]
            # every rank loads what rank 0 saved, and the next reduction sums over the ranks
            self._recent = state["recent"] if rank() == 0 else self._recent

    def to(self: _Sums, device: torch.device) -> _Sums:
        """Move to the device of the draws."""
        dtype = widest_float(device)
        self._edges = self._edges.to(device, dtype)
        self._recent = self._recent.to(device, dtype)
        return self

    def state(self) -> dict[str, Tensor]:
        """Return the sums of all ranks, on the CPU; all must call it."""
        recent = all_reduce_sum(self._recent) if ranks_save_together() else self._recent
        return {"sums": self._sums, "recent": recent.cpu().clone()}

    def _bins(self, noise_level: Tensor) -> Tensor:
        return torch.bucketize(noise_level.to(self._edges), self._edges)

    def _collect_recent(self) -> Tensor:
        """Return what all ranks have added since the last call, and start again at zero."""
        recent = all_reduce_sum(self._recent)
        self._recent = torch.zeros_like(recent)
        return recent.to(self._sums)
