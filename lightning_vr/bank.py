"""Before training: fill the target's bank, and refuse what cannot train."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_vr.references import check_samples
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


def check_clean(clean: Clean, num_classes: int | None, positions: Tensor | None = None) -> None:
    """Refuse samples, labels or indices that training would go wrong with.

    Args:
        clean: Encoded samples.
        num_classes: Number of classes of the module, or None.
        positions: Where the samples stand in the training set ``(B,)``, if that is known.

    Raises:
        ValueError: Naming the first sample that is not as it must be.
    """
    check_samples("x0", clean.x0)
    finite = torch.isfinite(clean.x0.flatten(1)).all(dim=1).cpu()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        known = clean.index if positions is None else positions
        name = f"row {row} of the batch" if known is None else f"sample {int(known[row])}"
        raise ValueError(
            f"The clean samples expected to be finite, but {name} is not: "
            f"remove it from the data or mend `encode`."
        )
    if clean.group is not None:
        check_group(clean.group, num_classes)
    if positions is None or clean.index is None:
        return
    if not torch.equal(clean.index.cpu(), positions):
        raise ValueError(
            f"Sample indices expected to be positions in the training set, but sample "
            f"{int(positions[0])} has index {int(clean.index[0])}: let the data set's item i "
            f"carry the index i."
        )


def check_group(group: Tensor, num_classes: int | None) -> None:
    """Refuse labels that are no int64 classes in ``[0, num_classes)``."""
    if num_classes is None:
        raise ValueError(
            "Argument `group` needs a class-conditional module: set `num_classes`, or leave it out."
        )
    if group.ndim != 1 or group.is_floating_point():
        raise ValueError(
            f"Class labels expected to be integers of shape (B,), but got {group.dtype} of shape "
            f"{tuple(group.shape)}."
        )
    if len(group) and not 0 <= int(group.min()) <= int(group.max()) < num_classes:
        worst = int(group.min()) if int(group.min()) < 0 else int(group.max())
        raise ValueError(
            f"Class labels expected to be in [0, {num_classes}), as `num_classes` says, "
            f"but got {worst}: set `num_classes` to {worst + 1} or mend the labels."
        )


def check_labels(num_classes: int | None, label_dropout: float) -> None:
    """Refuse a number of classes or a label dropout that means nothing."""
    if num_classes is not None and num_classes < 1:
        raise ValueError(
            f"Argument `num_classes` expected to be at least 1, but got {num_classes}."
        )
    if not 0 <= label_dropout <= 1:
        raise ValueError(
            f"Argument `label_dropout` expected to be between 0 and 1, but got {label_dropout}."
        )
    if label_dropout > 0 and num_classes is None:
        raise ValueError(
            f"Argument `label_dropout` of {label_dropout} needs labels to drop: set `num_classes`."
        )


def check_network(network: nn.Module, num_classes: int | None) -> None:
    """Refuse a network that divides its output by the time, or lacks a class embedding."""
    config = getattr(network, "config", None)
    settings = config if isinstance(config, Mapping) else vars(network)
    embeddings = settings.get("num_class_embeds")
    if num_classes is not None and embeddings is not None and embeddings <= num_classes:
        raise ValueError(
            f"Argument `network`: {type(network).__name__} has num_class_embeds={embeddings}, but "
            f"{num_classes} classes and the dropped label need {num_classes + 1}."
        )
    if settings.get("time_embedding_type") == "fourier":
        raise ValueError(
            f"Argument `network`: {type(network).__name__} with time_embedding_type='fourier' "
            f"divides its output by the time and takes its logarithm: use 'positional'."
        )
