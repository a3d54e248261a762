"""The samples that ``Convergence`` noises: some of the training set, and some that are held out."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_vr.callbacks.training_samples import finite_rows
from lightning_vr.core.distributed import gather_objects
from lightning_vr.core.rows import Rows, concatenated, mapped, rows_at, tensors
from lightning_vr.core.types import Clean
from lightning_vr.lifecycle.training_set import held_out_loader, loader_batches, training_loader

log = logging.getLogger(__name__)

CleanFunction = Callable[[Any], Clean]


def train_samples(
    trainer: Trainer, module: LightningModule, clean: CleanFunction, count: int
) -> Clean:
    """Return about ``count`` training samples of all ranks, evenly spaced, on the CPU.

    Their indices are their positions in the training set.
    """
    return _samples(trainer, module, training_loader(trainer), clean, count, "training samples")


def held_out_samples(
    trainer: Trainer, module: LightningModule, clean: CleanFunction, count: int
) -> Clean | None:
    """Do the same for the validation set; None, and a line in the log, where there is none."""
    try:
        loader = held_out_loader(trainer)
    except ValueError:
        if trainer.is_global_zero:
            log.info("Convergence measures no held-out loss: there is no one validation loader.")
        return None
    return _samples(trainer, module, loader, clean, count, "held-out samples")


@torch.no_grad()
def _samples(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    clean: CleanFunction,
    count: int,
    what: str,
) -> Clean:
    parts: list[Rows] = []
    for at, batch in loader_batches(trainer, loader, f"Reading {what}", count, key="convergence"):
        with trainer.precision_plugin.forward_context():
            rows = tensors(clean(batch))
        parts.append(mapped(rows | {"index": at}, lambda x: x.detach().cpu()))
    found = concatenated([part for of_rank in gather_objects(parts) for part in of_rank])
    order = found["index"].argsort()
    samples = Clean(**rows_at(found, order))
    assert samples.index is not None
    finite = finite_rows(samples.x0, samples.index, module, "Convergence")
    return samples if finite is None else samples.rows(finite)
