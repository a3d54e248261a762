"""The order of training samples: a pure function of (seed, epoch), which can start in mid-epoch.

Lightning restores the position in an epoch, but not what a shuffling loader would have given next.
Here the ranks take turns in one permutation per epoch, so that the batches of a step are the next
samples of the permutation whatever the number of ranks, and its position is all that must be
restored.
"""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_vr.core.rng import generator
from lightning_vr.data.dataset import SampleDataset


class EpochOrder(DistributedSampler[Any]):
    """Shuffled positions for one rank; Lightning does not replace it and sets its epoch.

    Args:
        dataset: The data set.
        seed: Seed of the permutations of all epochs, the same on all ranks.
        rank: This rank.
        world_size: Number of ranks. Up to W - 1 samples of an epoch are left out.
        epoch: The first epoch.
        start: Number of the rank's samples that this first epoch skips.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(dataset, world_size, rank, seed=seed, drop_last=True)
        self._first_epoch, self._start = epoch, start
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next, of the order and of samples that are drawn anew."""
        super().set_epoch(epoch)
        if isinstance(self.dataset, SampleDataset):
            self.dataset.start_epoch(self.seed, epoch)

    def __iter__(self) -> Iterator[int]:
        assert isinstance(self.dataset, Sized)
        self.set_epoch(self.epoch)
        source = generator(self.seed, "order", self.epoch)
        order = torch.randperm(len(self.dataset), generator=source)
        own = order[: self.total_size][self.rank :: self.num_replicas]
        start = self._start if self.epoch == self._first_epoch else 0
        self.epoch += 1  # for training loops that do not set the epoch
        return iter(own[start:].tolist())


class ResumableLoader(DataLoader[Any]):
    """A loader whose data module keeps its position: Lightning asks loaders, not data modules."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the data module has set the sampler's position."""
