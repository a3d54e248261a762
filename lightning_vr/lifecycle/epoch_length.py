"""One number of batches in an epoch for all ranks: a rank that ended early would block the others.

Collectives in a step (gradients, references gathered across ranks) hang if a rank is missing.
Lightning's samplers give all ranks equally many batches; a loader of the user's own may not.

Batches of one size are refused if the size differs between ranks: gradients are averaged over the
ranks, so that the samples of the larger batch would count less. Samplers that make batches of many
sizes are trusted, and the last batch of an epoch may be smaller.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.core.distributed import gather_objects, world_size


def check_training_batches(trainer: Trainer) -> None:
    """Raise if a fit has nothing to train on; call it before it begins, and when it has ended.

    Lightning skips a fit without batches, hooks included, and ends as if it were done.

    Raises:
        MisconfigurationException: If a limit or a loader allows no batch.
    """
    if trainer.limit_train_batches == 0:
        raise MisconfigurationException(
            "`limit_train_batches` must not be 0, with which `fit` trains nothing, got 0: use 1 or "
            "more, or `validate`."
        )
    if trainer.num_training_batches == 0:
        raise MisconfigurationException(
            "`train_dataloaders` must have at least one batch, got an empty loader: give it data, "
            "and a batch no larger than the data set where it drops the last one."
        )


def check_validation_batches(trainer: Trainer) -> None:
    """Raise if a validation loader is empty, with which no validation loss is ever logged.

    Raises:
        MisconfigurationException: With the number of the loader.
    """
    empty = [i for i, count in enumerate(trainer.num_val_batches) if count == 0]
    if empty and trainer.enable_validation:
        raise MisconfigurationException(
            f"`val_dataloaders` must have at least one batch each, got number {empty[0]} empty: "
            f"give it data, or set `limit_val_batches` to 0."
        )


def equalize_epoch_length(trainer: Trainer) -> None:
    """End epochs where the shortest rank's batches end; all ranks call it when loaders are new.

    Raises:
        MisconfigurationException: On all ranks, if a loader of any of them has no length, or if
            they have different settings.
    """
    if world_size() == 1:
        return
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    loaders = loop._combined_loader.flattened
    mine = (
        trainer.num_training_batches,
        any(sized_len(loader) is None for loader in loaders),
        {name: setting(trainer, loaders) for name, setting in _SETTINGS.items()},
    )
    counts, unsized, settings = zip(*gather_objects(mine), strict=True)
    _check_settings(settings)
    if any(unsized):
        raise MisconfigurationException(
            f"`train_dataloaders` must have a length on {world_size()} ranks, which must end an "
            f"epoch together, got a loader without one: define `__len__`, or use one device."
        )
    shortest = min(counts)
    if max(counts) == shortest:
        return
    rank_zero_warn(
        f"The training loaders of the ranks have different numbers of batches ({list(counts)}): "
        f"epochs end with the shortest. Give all ranks the same number, for example with "
        f"drop_last=True."
    )
    loop.max_batches = int(shortest)
    interval = trainer.val_check_interval
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(shortest * interval))


def _batch_sizes(loaders: list[Any]) -> list[int | None]:
    """Return the size of each loader's batches, None where its sampler makes them as it likes."""
    return [
        getattr(getattr(loader, "batch_sampler", loader), "batch_size", None) for loader in loaders
    ]


_SETTINGS: dict[str, Callable[[Trainer, list[Any]], Any]] = {
    "batch_size": lambda trainer, loaders: _batch_sizes(loaders),
    "accumulate_grad_batches": lambda trainer, _: trainer.accumulate_grad_batches,
    "max_steps": lambda trainer, _: trainer.max_steps,
    "max_epochs": lambda trainer, _: trainer.max_epochs,
}
"""What must be the same on all ranks."""


def _check_settings(settings: Sequence[dict[str, Any]]) -> None:
    for name in _SETTINGS:
        found = [own[name] for own in settings]
        if any(value != found[0] for value in found):
            shown = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in found]
            raise MisconfigurationException(
                f"`{name}` must be the same on all ranks, whose gradients are averaged, got "
                f"{shown} in the order of the ranks: configure all ranks alike."
            )
