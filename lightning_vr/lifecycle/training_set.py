"""One pass over the training set in its own order, for banks and reference statistics.

Training draws the same with and without the pass: it has a loader of its own, and the global random
states are restored. Under DDP each rank reads every W-th sample.
"""

from collections.abc import Callable, Generator, Iterator, Sized
from contextlib import closing, contextmanager
from typing import Any, cast

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_vr.core.distributed import all_gather_rows, rank, world_size
from lightning_vr.core.progress import progress_bar
from lightning_vr.core.rng import generator, preserve_global_rng, seed_global_rng
from lightning_vr.core.types import Clean


def training_batches(
    trainer: Trainer, title: str, limit: int | None = None, *, key: str = "training set"
) -> Generator[tuple[Tensor, Any], None, None]:
    """Yield ``(positions, batch)`` of this rank over the training set in order.

    Shows a progress bar if it takes longer than a second.

    Args:
        trainer: A trainer that is fitting.
        title: Text of the progress bar.
        limit: Stop after about this many samples over all ranks, evenly spaced, or None for all.
        key: Key of the randomness of data set and `encode`, the same for the same key.

    Raises:
        ValueError: If the training data is not one map-style data set behind one DataLoader.
    """
    return loader_batches(trainer, training_loader(trainer), title, limit, key=key)


def loader_batches(
    trainer: Trainer, loader: DataLoader[Any], title: str, limit: int | None = None, *, key: str
) -> Generator[tuple[Tensor, Any], None, None]:
    """Do what ``training_batches`` does, over the data set of any loader."""
    positions = _rank_positions(loader, limit)
    batch_size = loader.batch_size or 64
    own = DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=positions,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    is_shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    # a random upstream draws the same in a resumed run
    source = generator(key, rank(), device=trainer.strategy.root_device)
    with preserve_global_rng(), seed_global_rng(source):
        # tqdm starts the loader when it is made, and a loader that starts draws a seed
        bar = progress_bar(own, title, is_shown=is_shown)
        for i, batch in enumerate(bar):
            at = torch.tensor(positions[i * batch_size : (i + 1) * batch_size])
            yield at, transfer_batch(trainer, batch)


def transfer_batch(trainer: Trainer, batch: Any) -> Any:
    """Return a batch as training gets it: in the trainer's precision, after its hooks, moved."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def encoded_training_set(
    trainer: Trainer,
    encode: Callable[[Tensor, Any], Clean],
    title: str,
    limit: int | None = None,
    *,
    is_shard: bool = False,
) -> Clean | None:
    """Return the encoded training set of all ranks, in its own order, on the device of each.

    Args:
        trainer: A trainer that is fitting.
        encode: Turns ``(positions, batch)`` into clean samples.
        title: Text of the progress bar.
        limit: At most so many samples, evenly spaced, or None for all.
        is_shard: Whether to return only what this rank has read: every W-th sample of W ranks.

    Returns:
        Samples, their labels if they have any, and their positions as indices if every batch
        carries indices; None if samples have a condition without a ``cond_group``.
    """
    device = trainer.strategy.root_device
    count, done, indexed = len(_rank_positions(training_loader(trainer), limit)), 0, True
    found: dict[str, Tensor] = {}
    for at, batch in training_batches(trainer, title, limit):
        with trainer.precision_plugin.forward_context():
            clean = encode(at, batch)
        if clean.cond is not None and clean.cond_group is None:
            return None
        indexed = indexed and clean.index is not None
        parts = {"x0": clean.x0, "group": clean.group, "cond_group": clean.cond_group, "index": at}
        for name, part in parts.items():
            if part is None:
                continue
            # to concatenate a list of parts at the end would take the memory twice
            if name not in found:
                found[name] = part.new_empty(count, *part.shape[1:], device=device)
            found[name][done : done + len(at)] = part.detach()
        done += len(at)
    if not is_shard:
        order = all_gather_rows(found["index"]).argsort()
        found = {name: all_gather_rows(part)[order] for name, part in found.items()}
    return Clean(
        found["x0"],
        found.get("group"),
        index=found["index"] if indexed else None,
        cond_group=found.get("cond_group"),
    )


@contextmanager
def first_batch_again(trainer: Trainer, title: str) -> Iterator[tuple[Tensor, Any]]:
    """Read again what ``training_batches`` yields first, with other randomness."""
    with closing(training_batches(trainer, title, key="training set again")) as batches:
        yield next(batches)


def check_equal_chances(trainer: Trainer) -> None:
    """Raise if a loader does not draw every sample of its data set equally often.

    Samplers that are not torch's are trusted.

    Raises:
        ValueError: If training does not see the whole data set, as the bank would.
    """
    loader = training_loader(trainer)
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, DistributedSamplerWrapper):
        sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
    if isinstance(sampler, (SubsetRandomSampler, WeightedRandomSampler)):
        raise ValueError(
            f"`references` from the training set must come equally often in training, got a loader "
            f"with a {type(sampler).__name__}, whose mean is not that of all samples: wrap the "
            f"data in torch.utils.data.Subset, or use references='batch'."
        )
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit > 0:
        raise ValueError(
            f"`overfit_batches` must be 0 with references from the whole training set, got "
            f"{overfit}: wrap the data in torch.utils.data.Subset, or use references='batch'."
        )


def _rank_positions(loader: DataLoader[Any], limit: int | None) -> list[int]:
    """Return the positions that this rank reads, of at most ``limit`` evenly spaced ones."""
    size = data_size(loader)
    count = size if limit is None else min(limit, size)
    return [i * size // count for i in range(count)][rank() :: world_size()]


def data_size(loader: DataLoader[Any]) -> int:
    """Return the number of samples behind a loader of a map-style data set."""
    return len(cast(Sized, loader.dataset))


def training_loader(trainer: Trainer) -> DataLoader[Any]:
    """Return the loader of the training set: the trainer's, or its data module's when not fitting.

    Raises:
        ValueError: If it is not one DataLoader of a map-style data set.
    """
    loader = trainer.train_dataloader
    data = getattr(trainer, "datamodule", None)
    if loader is None and data is not None:
        loader = data.train_dataloader()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"`train_dataloaders` must be one DataLoader of a map-style data set, whose samples "
            f"have positions, got {type(loader).__name__}: use STF(references='batch') and no "
            f"callback that reads the whole training set."
        )
    return loader


def held_out_loader(trainer: Trainer) -> DataLoader[Any]:
    """Return the loader of the data that a trainer tests or validates on.

    Raises:
        ValueError: If it is not one DataLoader of a map-style data set.
    """
    is_test = trainer.state.fn == TrainerFn.TESTING
    loader: Any = trainer.test_dataloaders if is_test else trainer.val_dataloaders
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"Held-out data must be one DataLoader of a map-style data set, got "
            f"{type(loader).__name__}: use one, or give samples `conditions` and leave out the "
            f"measures of `Evaluation` that compare with it."
        )
    return loader
