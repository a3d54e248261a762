"""Encodes a data set once, into a cache on disk that ``CachedLatents`` reads.

Each shard is encoded by one process and written as a whole or not at all, with randomness keyed by
its place. So a run that was killed goes on with the shards that are missing, with any number of
processes, and the cache is the one that an uninterrupted run writes. The index comes last.

A cache holds one version of each sample: random augmentation would be frozen, and is refused.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_vr.core.conditions import expanded
from lightning_vr.core.distributed import rank, world_size
from lightning_vr.core.rng import generator, preserve_global_rng, seed_global_rng
from lightning_vr.core.validation import check_at_least, check_choice
from lightning_vr.data.latent_files import (
    INDEX,
    SPLITS,
    Header,
    Identity,
    Index,
    Shard,
    Sums,
    check_shard,
    expected_header,
    is_as_written,
    open_shard,
    read_index,
    shard_bytes,
    shard_name,
)
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.resumable_module import ResumableModule
from lightning_vr.lifecycle.stopping import raise_if_asked
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of, using_callbacks
from lightning_vr.lifecycle.training_set import data_size, transfer_batch
from lightning_vr.training.cached_data import data_digest, split_loaders
from lightning_vr.training.checks import check_clean
from lightning_vr.training.latents import LatentDiffusionModule

log = logging.getLogger(__name__)

CacheDtype = Literal["float32", "float16", "bfloat16"]

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def cache_latents(
    module: LatentDiffusionModule,
    datamodule: LightningDataModule,
    path: str | Path,
    *,
    batch_size: int = 16,
    shard_size: int = 1024,
    dtype: CacheDtype = "float32",
    trainer: Trainer | None = None,
) -> None:
    """Write the latents, labels and conditions of a data module's data to disk.

    Where some of the cache is there already, only what is missing or damaged is encoded.

    Args:
        module: Encodes pictures, and further columns by its ``encode_condition``.
        datamodule: Training and validation data.
        path: The folder of the cache.
        batch_size: Pictures to encode at a time.
        shard_size: Samples in a file.
        dtype: The dtype of means and standard deviations on disk.
        trainer: Its devices and processes encode; each writes shards of its own.

    Raises:
        ValueError: If the folder holds a cache of others, or the data differ from one time to the
            next.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("shard_size", shard_size, 1)
    check_choice("dtype", dtype, tuple(_DTYPES))
    if not isinstance(module, LatentDiffusionModule):
        raise ValueError(
            f"`model` must be a LatentDiffusionModule, whose autoencoder makes the latents, got a "
            f"{type(module).__name__}: use one with `autoencoder: {{path: ...}}`."
        )
    loaders = split_loaders(datamodule)
    identity = Identity(
        module.autoencoder.digest,
        module.condition_digest,
        data_digest(datamodule, loaders),
        shard_size,
        dtype,
    )
    writer = _CacheWriter(module, loaders, Path(path).expanduser(), identity, batch_size)
    writer.num_classes = getattr(datamodule, "num_classes", None) or module.num_classes
    trainer = trainer or Trainer(logger=False, enable_checkpointing=False)
    # nothing is trained that others could watch
    bars = [each for each in callbacks_of(trainer) if isinstance(each, ProgressBar)]
    with using_callbacks(trainer, bars):
        # that of a subclass may draw samples
        Trainer.predict(trainer, writer, return_predictions=False)


class _OwnShards(DistributedSampler[int]):
    """The shards of one rank, by position; a loader that has such a sampler keeps it.

    Position 0 is no shard: a rank without any must still wait for the others.
    """

    def __init__(self, numbers: range) -> None:
        super().__init__(numbers, world_size(), rank(), shuffle=False)  # type: ignore[arg-type]
        self.own = list(range(1, len(numbers)))[rank() :: world_size()] or [0]

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)


class _CacheWriter(ResumableModule):
    """Writes one shard in each step of ``predict``."""

    def __init__(
        self,
        model: LatentDiffusionModule,
        loaders: dict[str, DataLoader[Any]],
        folder: Path,
        identity: Identity,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.model, self.loaders, self.folder = model, loaders, folder
        self.identity, self.batch_size = identity, batch_size
        self.num_classes: int | None = None
        size = identity.shard_size
        self.places = [
            (split, first, min(size, data_size(loader) - first))
            for split, loader in loaders.items()
            for first in range(0, data_size(loader), size)
        ]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the numbers of this rank's shards."""
        numbers: Any = range(-1, len(self.places))
        return DataLoader(numbers, sampler=_OwnShards(numbers), collate_fn=_only)

    def predict_step(self, batch: int, batch_idx: int) -> int:
        """Write a shard, unless it is there, and return its number."""
        if batch >= 0:
            self._write(batch)
        return batch

    def on_predict_end(self) -> None:
        """Write the index once all ranks are done."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            index = self._index()
            with replacing(self.folder / INDEX, "w") as file:
                file.write(index.to_json())
            read_index(self.folder)
        self.trainer.strategy.barrier()

    def _write(self, number: int) -> None:
        split, first, samples = self.places[number]
        path = self._path(split, first)
        expected = expected_header(self.identity, first, samples)
        if path.exists() and _is_whole(path, expected):
            return
        source = generator("cache", split, first, device=self.device)
        with preserve_global_rng(), seed_global_rng(source):
            columns = self._encode(split, range(first, first + samples))
        with replacing(path) as file:
            file.write(shard_bytes(columns, expected))

    def _encode(self, split: str, positions: range) -> dict[str, Tensor]:
        loader = self.loaders[split]
        own = DataLoader(
            loader.dataset,
            batch_size=self.batch_size,
            sampler=positions,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
        )
        parts = []
        for i, batch in enumerate(own):
            raise_if_asked(self.trainer)
            at = torch.tensor(positions[i * self.batch_size : (i + 1) * self.batch_size])
            parts.append(self._columns(at, transfer_batch(self.trainer, batch)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _columns(self, positions: Tensor, batch: Any) -> dict[str, Tensor]:
        clean, std = self.model.encode_moments(batch)
        if self.num_classes is None:
            clean = replace(clean, group=None)
        check_clean(clean, self.num_classes, positions)
        dtype = _DTYPES[self.identity.dtype]
        found = {"mean": clean.x0.to(dtype), "std": std.to(dtype)}
        if clean.group is not None:
            found["label"] = clean.group
        cond = expanded(clean.cond or {}, len(positions))  # one row may be for all
        found |= dict(_named(cond, "cond"))
        return {name: x.detach().cpu().contiguous() for name, x in found.items()}

    def _index(self) -> Index:
        shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        sums: dict[str, Sums] = {}
        for split, first, samples in self.places:
            path = self._path(split, first)
            header = open_shard(path)[1]
            own = Sums(**header["sums"])
            sums[split] = own if split not in sums else sums[split] + own
            name = path.relative_to(self.folder).as_posix()
            shards[split].append(Shard(name, first, samples, path.stat().st_size))
        return Index(self.identity, self.num_classes, shards, sums)

    def _path(self, split: str, first: int) -> Path:
        return self.folder / shard_name(split, first // self.identity.shard_size)


def _only(numbers: list[int]) -> int:
    return numbers[0]


def _named(cond: dict[str, Any], path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a condition by their paths."""
    for name, x in cond.items():
        if isinstance(x, dict):
            yield from _named(x, f"{path}.{name}")
        else:
            yield f"{path}.{name}", x


def _is_whole(path: Path, expected: Header) -> bool:
    """Return whether a shard needs not be written again.

    Raises:
        ValueError: If it is of another cache.
    """
    try:
        columns, header = open_shard(path)
    except ValueError as error:
        log.warning("%s is damaged, and is written again (%s).", path, error.__cause__)
        return False
    check_shard(path, columns, header, expected)
    if not is_as_written(columns, header):
        log.warning("%s holds other numbers than were written, and is written again.", path)
        return False
    return True
