"""Batches of the training set in pairs that share no sample, as units of a measurement."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_vr.core.batches import batch_size
from lightning_vr.lifecycle.training_set import transfer_batch


def batch_pairs(trainer: Trainer, loader: DataLoader[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of whole batches on the trainer's device, over as many epochs as needed.

    Disjoint batches differ as independent ones of an endless data set would: the difference of
    their means has ``2 / B`` times the variance of the data, counted with N - 1.

    Raises:
        ValueError: If an epoch has fewer than two whole batches.
    """
    size, epoch = loader.batch_size, 0
    while True:
        previous, pairs = None, 0
        for batch in loader:
            size = size or batch_size(batch)
            if batch_size(batch) != size:
                continue
            batch = transfer_batch(trainer, batch)
            if previous is None:
                previous = batch
            else:
                yield previous, batch
                previous, pairs = None, pairs + 1
        if pairs == 0:
            raise ValueError(
                f"The audit needs two whole batches in an epoch, got {len(loader)} of {size} "
                f"samples: use a smaller batch size."
            )
        epoch += 1
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
