"""The target's bank: the training set, encoded once before training."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_vr.core.types import Clean
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import Target
from lightning_vr.lifecycle.training_set import check_equal_chances, encoded_training_set
from lightning_vr.training.checks import check_clean

if TYPE_CHECKING:
    from lightning_vr.training.module import DiffusionModule


@torch.no_grad()
def fill_target(module: "DiffusionModule") -> None:
    """Give ``module.target`` its references: the training set, encoded by the module on all ranks.

    A target that is sharded gets what this rank has read, and the set never exists as a whole.

    Raises:
        ValueError: If samples, labels or indices are not what they must be, or samples do not come
            equally often.
    """

    def encode(positions: Tensor, batch: Any) -> Clean:
        clean = module.clean(batch)
        check_clean(clean, module.num_classes, positions)
        return clean

    target = module.target
    if isinstance(target, STF):
        target.bank = None  # an earlier fit's, beside which there may be no room
    if target.bank_size is None:
        check_equal_chances(module.trainer)
    clean = encoded_training_set(
        module.trainer, encode, "Encoding references", target.bank_size, is_shard=target.sharded
    )
    if clean is not None:
        fill(target, clean)


def fill(target: Target, clean: Clean) -> None:
    """Give a target the training set, or this rank's share of it if the target is sharded.

    Args:
        target: A target that takes references.
        clean: What ``encoded_training_set`` has read for it.
    """
    target.fill(
        clean.x0,
        clean.group,
        indexed=clean.index is not None,
        cond_group=clean.cond_group,
        is_shard=target.sharded,
    )
