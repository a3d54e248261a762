"""The clean samples of the training set that callbacks measure on."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_vr.core.types import Clean
from lightning_vr.lifecycle.training_set import data_size, encoded_training_set, training_loader
from lightning_vr.posterior.references import References
from lightning_vr.training.module import DiffusionModule

log = logging.getLogger(__name__)


@torch.no_grad()
def training_samples(
    trainer: Trainer,
    module: LightningModule,
    clean: Callable[[Any], Any] | None,
    max_data: int,
    reader: str,
) -> Clean | None:
    """Return clean samples of the training set from all ranks, or None if none are exchangeable.

    Their indices are their positions in it, in increasing order. The bank of the module's own STF
    is used where it holds them all.

    Args:
        trainer: A trainer that is fitting.
        module: The module that it trains.
        clean: A function from a batch to clean samples, needed unless it is a DiffusionModule.
        max_data: Largest number of samples, evenly spaced.
        reader: The callback that reads them, for messages.
    """
    size = data_size(training_loader(trainer))
    if size > max_data and trainer.is_global_zero:
        log.warning(
            "%s uses %d of the %d training samples, as many as `max_data` allows.",
            reader,
            max_data,
            size,
        )
    bank = getattr(getattr(module, "target", None), "bank", None)
    if isinstance(bank, References) and clean is None and _has_classes_alone(bank):
        return _evenly_spaced(bank, max_data)

    found = encoded_training_set(
        trainer,
        lambda _, batch: _clean(module, clean, batch),
        "Reading the training set",
        max_data,
    )
    if found is None:
        log.warning(
            "%s: batches carry a condition beyond class labels, for which no two samples are "
            "exchangeable; the variance of the target is not measured.",
            reader,
        )
        return None
    found = replace(found, index=_positions(found.x0, size))
    assert found.index is not None
    rows = finite_rows(found.x0, found.index, module, reader)
    return found if rows is None else found.rows(rows)


def finite_rows(
    x: torch.Tensor, positions: torch.Tensor, module: LightningModule, reader: str
) -> torch.Tensor | None:
    """Return the rows of samples that are finite, or None if all are.

    The others are left out with a warning where the module leaves out training steps with them.

    Args:
        x: Samples of the training set ``(B, *)``.
        positions: Where they are in it ``(B,)``.
        module: The module that trains on them.
        reader: The callback that reads them.

    Raises:
        ValueError: Naming the first sample that is not finite, if none may be left out.
    """
    is_finite = x.flatten(1).isfinite().all(dim=1).cpu()
    if bool(is_finite.all()):
        return None
    wrong = positions.cpu()[~is_finite].tolist()
    others = f" (nor are {len(wrong) - 1} others)" if len(wrong) > 1 else ""
    if getattr(module, "on_nonfinite", "raise") != "skip" or not bool(is_finite.any()):
        raise ValueError(
            f"Clean samples must be finite, but sample {wrong[0]} of the training set is not"
            f"{others}: remove it from the data or fix `encode`."
        )
    log.warning(
        "%s leaves out sample %d of the training set, which is not finite%s.",
        reader,
        wrong[0],
        others,
    )
    return is_finite.nonzero()[:, 0].to(x.device)


def _clean(module: LightningModule, clean: Callable[[Any], Any] | None, batch: Any) -> Clean:
    if clean is not None:
        return Clean.from_batch(clean(batch))
    assert isinstance(module, DiffusionModule)
    return module.clean(batch)


def _evenly_spaced(bank: References, limit: int) -> Clean:
    index = _positions(bank.rows[:limit], len(bank))
    group = None if bank.group is None else bank.group[index]
    return Clean(bank.rows[index] + bank.centre, group, index=index)


def _positions(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return where as many samples as ``x`` has are among ``size``, evenly spaced."""
    return torch.arange(len(x), device=x.device) * size // len(x)


def _has_classes_alone(bank: References) -> bool:
    """Return whether no further conditions are among a bank's labels."""
    return bank.group is None or bank.group.ndim == 1
