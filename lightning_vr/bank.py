"""The target's bank: the training set, encoded once before training."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_vr.checks import check_clean
from lightning_vr.training_set import encoded_training_set
from lightning_vr.types import Clean

if TYPE_CHECKING:
    from lightning_vr.module import DiffusionModule


@torch.no_grad()
def fill_target(module: "DiffusionModule") -> None:
    """Give ``module.target`` its references: the training set, encoded by the module on all ranks.

    Raises:
        ValueError: If samples, labels or indices are not what they must be.
    """

    def encode(positions: Tensor, batch: Any) -> Clean:
        clean = module.clean(batch)
        check_clean(clean, module.num_classes, positions)
        return clean

    size = module.target.bank_size
    clean = encoded_training_set(module.trainer, encode, "Encoding references", size)
    if clean is not None:
        module.target.fill(clean.x0, clean.group, indexed=clean.index is not None)
