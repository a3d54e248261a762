"""Latents that were encoded once, by ``python -m lightning_vr cache``, and are read from disk.

A cache holds the posterior ``N(m, s²)`` of each latent. With ``posterior="sample"`` the latent of a
sample is drawn anew in each epoch, by a generator keyed by the seed of the order, the epoch and the
sample's position: an epoch is a data set of its own, the same for all ranks, workers and readers,
and again after a resume. Validation data keep one draw.

What this changes for estimators:

- ``STF``: within an epoch the own sample is the tensor that its bank holds, and each latent of the
  epoch is as likely to have made x_t: the target is unbiased, as the bank is filled again with the
  draws of each epoch. A bank of an earlier epoch's draws would not be. ``"batch"`` needs no bank;
  with ``posterior="mean"`` one bank serves the whole run.
- ``CARV``: what K draws of a latent spread over is the cost of encoding it, which is nothing once
  it is cached. K = 1 is best again, and ``CARV("auto")`` finds it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.rng import generator
from lightning_vr.core.validation import check_choice
from lightning_vr.data.datamodule import SplitDataModule
from lightning_vr.data.dataset import Sample, SampleDataset
from lightning_vr.data.latent_files import (
    Header,
    Index,
    Posterior,
    Shard,
    check_shard,
    expected_header,
    is_as_written,
    not_whole,
    open_shard,
    read_index,
)

_COND = "cond."


class CachedLatents(SplitDataModule):
    """Latents, labels and conditions from a cache on disk.

    A batch holds ``"x0"``, ``"index"``, and ``"label"`` and ``"cond"`` where there are any: a
    plain ``DiffusionModule`` trains on it, and a ``LatentDiffusionModule`` also decodes.

    Args:
        path: The folder of the cache.
        batch_size: Samples per batch and process.
        posterior: Whether latents are drawn from their posteriors, anew in each epoch, or are the
            posteriors' means.
        num_workers: Processes that load batches; 0 loads them in the training process.
        verify: Whether to read the whole cache first, and compare its digests.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 128,
        posterior: Posterior = "sample",
        num_workers: int = 0,
        verify: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_choice("posterior", posterior, ("sample", "mean"))
        self.path = path
        self.posterior: Posterior = posterior
        self.verify = verify
        self._index: Index | None = None

    @property
    def index(self) -> Index:
        """What the cache is of.

        Raises:
            ValueError: If it is not whole.
        """
        if self._index is None:
            self._index = read_index(Path(self.path).expanduser())
        return self._index

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return tuple(self._part("train")[0]["x0"].shape)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None if the data has no labels."""
        return self.index.num_classes

    def build_datasets(self) -> tuple["LatentDataset", "LatentDataset"]:
        """Open both parts."""
        parts = self._part("train"), self._part("validation")
        for part in parts if self.verify else ():
            part.check()
        return parts

    def _part(self, split: str) -> "LatentDataset":
        return LatentDataset(Path(self.path).expanduser(), self.index, split, self.posterior)


class LatentDataset(SampleDataset):
    """One part of a cache.

    Args:
        folder: The folder of the cache.
        index: Its index.
        split: Which part.
        posterior: Whether latents are drawn or are means.
    """

    def __init__(self, folder: Path, index: Index, split: str, posterior: Posterior) -> None:
        self.folder, self.index, self.split, self.posterior = folder, index, split, posterior
        self._shards = index.shards[split]
        # seed and epoch, which the workers of a loader see change
        self._version = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._columns: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self._shards[-1].first + self._shards[-1].samples

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        number = index // self.index.identity.shard_size
        columns = self._open(number)
        row = index - self._shards[number].first
        sample: dict[str, Any] = {
            "x0": self._latent(columns["mean"][row], columns["std"][row], index),
            "index": torch.tensor(index),
        }
        if "label" in columns:
            sample["label"] = columns["label"][row]
        for name, x in columns.items():
            if name.startswith(_COND):
                _put(sample, name.split("."), x[row])
        return sample

    @property
    def version(self) -> tuple[int, int] | None:
        """Seed and epoch of the draws, None for means."""
        if self.posterior == "mean":
            return None
        seed, epoch = self._version.tolist()
        return seed, epoch

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Draw latents anew."""
        self._version.copy_(torch.tensor([seed, epoch]))

    def stored_samples(self) -> tuple[list[Tensor], Tensor | None] | None:
        """Return the posteriors' means and labels, unless latents are drawn."""
        if self.posterior == "sample":
            return None
        shards = [self._open(number) for number in range(len(self._shards))]
        labels = [columns["label"] for columns in shards if "label" in columns]
        return [columns["mean"] for columns in shards], torch.cat(labels) if labels else None

    def standard_deviation(self) -> float:
        """Return that of all entries: over the draws, if latents are drawn."""
        return self.index.sums[self.split].standard_deviation(self.posterior)

    def check(self) -> None:
        """Raise if a row is not what was written.

        Raises:
            ValueError: With the file.
        """
        for shard in self._shards:
            if not is_as_written(*self._checked(shard)):
                raise not_whole(self.folder / shard.file, "holds other numbers than were written")

    def _latent(self, mean: Tensor, std: Tensor, index: int) -> Tensor:
        if self.posterior == "mean":
            return mean.float()
        source = generator(*self._version.tolist(), "latent", self.split, index)
        return mean.float() + std.float() * torch.randn(mean.shape, generator=source)

    def _open(self, number: int) -> dict[str, Tensor]:
        if number not in self._columns:
            self._columns[number], _ = self._checked(self._shards[number])
        return self._columns[number]

    def _checked(self, shard: Shard) -> tuple[dict[str, Tensor], Header]:
        path = self.folder / shard.file
        columns, header = open_shard(path)
        expected = expected_header(self.index.identity, shard.first, shard.samples)
        check_shard(path, columns, header, expected)
        return columns, header

    def __getstate__(self) -> dict[str, Any]:
        # what is mapped would be copied to the workers of a loader
        return {**self.__dict__, "_columns": {}}


def _put(sample: dict[str, Any], path: list[str], x: Tensor) -> None:
    """Put a tensor into nested dictionaries."""
    for name in path[:-1]:
        sample = sample.setdefault(name, {})
    sample[path[-1]] = x
