"""The data that a cache is made of: their loaders, and what tells them from other data."""

import hashlib
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vr.core.digests import digest
from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.lifecycle.training_set import data_size

_PROBES = 16


def split_loaders(datamodule: LightningDataModule) -> dict[str, DataLoader[Any]]:
    """Return the loaders of training and validation, whose data sets are read in order."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    found: Any = {"train": datamodule.train_dataloader(), "validation": datamodule.val_dataloader()}
    for split, loader in found.items():
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
            raise ValueError(
                f"`data` must have one DataLoader of a map-style data set for {split}, got "
                f"{type(loader).__name__}: give it one."
            )
    return dict(found)


def data_digest(datamodule: Any, loaders: dict[str, DataLoader[Any]]) -> str:
    """Return a digest of the sizes of data and of some samples.

    Raises:
        ValueError: If samples are other ones when they are read again.
    """
    with preserve_global_rng():
        found, again = _probes(loaders), _probes(loaders)
    if found != again:
        raise ValueError(
            f"`data` must give the same sample each time to be cached, but the "
            f"{type(datamodule).__name__} gives another: leave out random augmentation."
        )
    return found


def _probes(loaders: dict[str, DataLoader[Any]]) -> str:
    found = hashlib.sha256()

    def add(x: Any) -> None:
        found.update((digest({"": x}) if isinstance(x, Tensor) else repr(x)).encode())

    for split, loader in loaders.items():
        size = data_size(loader)
        found.update(f"{split} {size}".encode())
        count = min(_PROBES, size)
        for position in (i * size // count for i in range(count)):
            batch = loader.collate_fn([loader.dataset[position]])
            apply_to_collection(batch, (Tensor, str, int, float), add)
    return found.hexdigest()
