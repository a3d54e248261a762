"""The target's bank: the training set, encoded once before training."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.core.types import Clean
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import Target
from lightning_vr.lifecycle.stopping import raise_if_asked
from lightning_vr.lifecycle.training_set import (
    check_equal_chances,
    encoded_training_set,
    first_batch_again,
)
from lightning_vr.training.checks import check_clean
from lightning_vr.training.diffusion import Diffusion


@torch.no_grad()
def fill_target(model: Diffusion, trainer: Trainer) -> None:
    """Give the model's target its references: the encoded training set, of all ranks.

    A sharded target gets what this rank has read, and the set never exists as a whole.

    Raises:
        ValueError: If samples, labels or indices are wrong, or samples do not come equally often.
    """
    target = model.target
    if isinstance(target, STF):
        target.bank = None  # an earlier fit's, beside which there may be no room
    if target.bank_size is None:
        check_equal_chances(trainer)
    clean = read_references(model, trainer, target.bank_size, is_shard=target.sharded)
    if clean is not None:
        set_references(target, clean)
    is_unindexed = clean is not None and clean.index is None
    if is_unindexed and isinstance(target, STF) and target.bank is not None:
        compare_by_reading_again(model, trainer, target)


@torch.no_grad()
def compare_by_reading_again(model: Diffusion, trainer: Trainer, target: STF) -> None:
    """Warn if a first batch, encoded again, differs from its copies in the bank.

    Without indices the batches of training cannot be compared, as their copies are not known.
    """
    precision = trainer.precision_plugin.forward_context()
    with first_batch_again(trainer, "Encoding references again") as (positions, batch), precision:
        clean = model.clean(batch)
    target.compare(clean.x0, positions)


def read_references(
    model: Diffusion, trainer: Trainer, limit: int | None = None, *, is_shard: bool = False
) -> Clean | None:
    """Return the encoded and checked training set, or None if no samples are exchangeable.

    Args:
        model: The model.
        trainer: A trainer that is fitting it.
        limit: At most so many samples, evenly spaced, or None for all.
        is_shard: Whether to return what this rank has read alone.
    """

    def encode(positions: Tensor, batch: object) -> Clean:
        raise_if_asked(trainer)  # to encode a large set takes long, and nothing is trained yet
        clean = model.clean(batch)
        check_clean(clean, model.num_classes, positions)
        return clean

    return encoded_training_set(trainer, encode, "Encoding references", limit, is_shard=is_shard)


def set_references(target: Target, clean: Clean) -> None:
    """Give a target the references that ``read_references`` has read for it."""
    target.fill(
        clean.x0,
        clean.group,
        indexed=clean.index is not None,
        cond_group=clean.cond_group,
        is_shard=target.sharded,
    )
