"""What the samples of a callback are conditioned on: asked for, or that of validation data."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vr.core.conditions import Condition, condition_rows
from lightning_vr.core.rng import generator, preserve_global_rng, seed_global_rng
from lightning_vr.data.conditions import Conditions
from lightning_vr.lifecycle.training_set import data_size, held_out_loader, transfer_batch
from lightning_vr.process.sampling import evaluating
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.upstream import Upstream


class Asked(NamedTuple):
    """Labels ``(n,)`` or None, and a condition of n rows or None, as ``sample`` takes them."""

    group: Tensor | None
    cond: Condition | None


@torch.no_grad()
def asked(conditions: Conditions, module: DiffusionModule, numbers: Tensor) -> Asked:
    """Return what samples ``numbers (n,)`` are conditioned on by rows that are cycled over."""
    rows = conditions.rows(numbers)
    with evaluating(module):
        cond = module.encode_condition(rows.columns) if rows.columns else None
    return Asked(rows.labels, cond)


@torch.no_grad()
def validated(trainer: Trainer, module: DiffusionModule, numbers: Tensor) -> Asked:
    """Return what samples ``numbers (n,)`` are conditioned on by validation data, cycled over.

    Without a further condition in the data these are the classes, cycled over. The data is encoded
    with randomness of its own. All ranks may ask for any sample.
    """
    classes = None if module.num_classes is None else numbers % module.num_classes
    if type(module).encode is Upstream.encode:
        return Asked(classes, None)
    loader = held_out_loader(trainer)
    size = data_size(loader)
    positions, rows = torch.unique(numbers % size, return_inverse=True)
    some: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=len(positions),
        sampler=positions.tolist(),
        collate_fn=loader.collate_fn,
    )
    source = generator("conditions", device=trainer.strategy.root_device)
    # a loader that starts draws a seed
    with preserve_global_rng(), seed_global_rng(source), evaluating(module):
        clean = module.clean(transfer_batch(trainer, next(iter(some))))
    if clean.cond is None:
        return Asked(classes, None)
    rows = rows.to(clean.x0.device)
    group = None if clean.group is None else clean.group[rows]
    return Asked(group, condition_rows(clean.cond, rows))
