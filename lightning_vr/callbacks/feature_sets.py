"""Features of whole sets of samples, gathered from all ranks, in an order that is always the same.

Each rank reads or generates its part of a set. What the ranks have found is put into the order of
the samples, so that a measure of it is that of one process.
"""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vr.callbacks.after_validation import AfterValidation
from lightning_vr.callbacks.real_samples import CleanFunction, default_features, real_samples
from lightning_vr.callbacks.reference_cache import cached_features
from lightning_vr.callbacks.sample_blocks import sample_blocks
from lightning_vr.callbacks.training_samples import finite_rows
from lightning_vr.core.distributed import all_gather_rows, world_size
from lightning_vr.lifecycle.training_set import (
    loader_batches,
    training_batches,
    training_loader,
)
from lightning_vr.metrics import Features
from lightning_vr.metrics.frechet_metric import check_real_and_finite


@torch.no_grad()
def loader_features(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[None],
    clean: CleanFunction | None,
    features: Features,
    title: str,
    reader: str,
    limit: int | None = None,
) -> Tensor:
    """Return the features ``(n, f)`` of the samples behind a loader, in the data set's order.

    Args:
        trainer: The trainer.
        module: Its module.
        loader: A loader of the trainer.
        clean: Gives the real samples of a batch, for modules that are no ``DiffusionModule``.
        features: Where to compare, on the module's device.
        title: Text of the progress bar.
        reader: The callback that reads them.
        limit: At most so many samples, evenly spaced, or None for all.
    """
    parts, positions = [_empty(features, trainer)], [torch.empty(0, dtype=torch.int64)]
    for at, batch in loader_batches(trainer, loader, title, limit, key="features"):
        real = real_samples(module, clean, batch)
        rows = finite_rows(real, at, module, reader)
        if rows is not None:
            real, at = real[rows], at[rows.cpu()]
        parts.append(_checked(features, real, "real"))
        positions.append(at)
    return in_order(torch.cat(parts), torch.cat(positions))


def training_features(
    trainer: Trainer,
    module: LightningModule,
    clean: CleanFunction | None,
    features: Features,
    limit: int | None,
    cache: str | Path | None,
    reader: str,
) -> Tensor:
    """Return the features ``(n, f)`` of the training set, from a folder where they are kept.

    Args:
        trainer: The trainer.
        module: Its module.
        clean: Gives the real samples of a batch, for modules that are no ``DiffusionModule``.
        features: Where to compare, on the module's device.
        limit: At most so many samples, evenly spaced, or None for all.
        cache: The folder, or None.
        reader: The callback that reads them.
    """
    loader, title = training_loader(trainer), "Reading the training set"

    def read(limit: int | None) -> Tensor:
        return loader_features(trainer, module, loader, clean, features, title, reader, limit)

    if cache is None:
        return read(limit)
    return cached_features(trainer, cache, features, loader.dataset, limit, read)


@torch.no_grad()
def features_of_training_set(
    trainer: Trainer,
    module: LightningModule,
    clean: CleanFunction | None,
    given: Features | None,
) -> Features:
    """Return the features to compare in, by one training sample on each rank.

    Args:
        trainer: The trainer.
        module: Its module.
        clean: Gives the real samples of a batch, for modules that are no ``DiffusionModule``.
        given: The features; the default ones of such samples if None.

    Raises:
        ValueError: If they do not take the samples.
    """
    for _, batch in training_batches(trainer, "Checking the data", world_size()):
        real = real_samples(module, clean, batch)
        features = given or default_features(real)
        features.check_images(real)
    return features


def generated_features(
    callback: AfterValidation,
    trainer: Trainer,
    module: LightningModule,
    features: Features,
    count: int,
    key: str,
    start: int,
) -> Tensor:
    """Return the features ``(count, f)`` of generated samples, as ``sample_blocks`` gives them."""
    parts, positions = [_empty(features, trainer)], [torch.empty(0, dtype=torch.int64)]
    for first, samples in sample_blocks(callback, trainer, module, count, key, start):
        parts.append(_checked(features, samples, "generated"))
        positions.append(torch.arange(first, first + len(samples)))
    return in_order(torch.cat(parts), torch.cat(positions))


def in_order(values: Tensor, positions: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of their positions."""
    order = all_gather_rows(positions.to(values.device)).argsort()
    return all_gather_rows(values)[order]


def _checked(features: Features, samples: Tensor, side: str) -> Tensor:
    found: Tensor = features(samples)
    check_real_and_finite(f"{side} samples", samples)
    check_real_and_finite(f"features {features.name!r} of the {side} samples", found)
    return found


def _empty(features: Features, trainer: Trainer) -> Tensor:
    """Return no features: a rank may have no samples of a small set."""
    return torch.empty(0, features.dimension, device=trainer.strategy.root_device)
