"""The target's bank: the training set, encoded once before training, or once in each epoch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.core.distributed import rank, world_size
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean, Noised, StepPart
from lightning_vr.data.dataset import SampleDataset
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import Target
from lightning_vr.lifecycle.stopping import raise_if_asked
from lightning_vr.lifecycle.training_set import (
    check_equal_chances,
    encoded_training_set,
    first_batch_again,
    training_batches,
    training_loader,
)
from lightning_vr.posterior.sharded_references import Bank, ShardedReferences
from lightning_vr.posterior.stored_references import StoredReferences, as_numbers, as_stored
from lightning_vr.training.checks import check_clean
from lightning_vr.training.diffusion import Diffusion

_COMPARED = 16
"""Number of samples over all ranks that are encoded, to compare them with the files."""


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
    if isinstance(target, STF) and target.storage == "data":
        map_references(model, trainer, target)
        return
    clean = read_references(model, trainer, target.bank_size, target)
    if clean is not None:
        set_references(target, clean)
    target.data_version = _data_version(trainer)
    is_unindexed = clean is not None and clean.index is None
    if is_unindexed and isinstance(target, STF) and target.bank is not None:
        compare_by_reading_again(model, trainer, target)


def refill_target(model: Diffusion, trainer: Trainer) -> None:
    """Fill a bank again where the training set has other samples than the bank is of.

    Latents that are drawn anew in each epoch are exchangeable with those of the same epoch alone.
    """
    is_filled = isinstance(model.target, STF) and model.target.bank is not None
    if is_filled and model.target.data_version != _data_version(trainer):
        fill_target(model, trainer)


def prefetch_references(
    model: Diffusion, trainer: Trainer, micro_step: int, noised: Noised
) -> None:
    """Begin to read what the next step will draw, where that is not in memory.

    Which step is next is a guess, after the last one for example.
    """
    target = model.target
    if not (isinstance(target, STF) and target.reads_ahead):
        return
    is_stepping = micro_step + 1 == trainer.accumulate_grad_batches or trainer.is_last_batch
    step = (trainer.global_step + 1, 0) if is_stepping else (trainer.global_step, micro_step + 1)
    # of a sharded bank all ranks use what the first one draws
    drawing_rank = 0 if target.sharded else rank()
    source = generator(model.run_seed, drawing_rank, "train", *step, device=noised.t.device)
    prefetch(model, target, noised, source)


@torch.no_grad()
def prefetch(model: Diffusion, target: STF, noised: Noised, source: torch.Generator) -> None:
    """Begin to read what a step will draw from a generator in the state of ``source``.

    A wrong guess costs time alone: a step uses what was read only if it draws the same.

    Args:
        model: The model that takes the step.
        target: Its target, whose references are drawn and stored.
        noised: The draws of the last step, whose batch is taken to be as large.
        source: The generator, which is drawn from.
    """
    # times and noise come first, from the same generator: draw as many
    last = Clean(noised.x0, noised.group, noised.cond, cond_group=noised.cond_group)
    clean = last.rows(slice(None, None, model.draws.draws_per_sample))
    part = StepPart(shared=generator("strata", device=source.device))
    model.noised(clean, source, model.draws.times(clean, model.objective, source, part))
    target.prefetch(source)


def _data_version(trainer: Trainer) -> Any:
    return getattr(training_loader(trainer).dataset, "version", None)


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
    model: Diffusion, trainer: Trainer, limit: int | None = None, target: Target | None = None
) -> Clean | None:
    """Return the encoded and checked training set, or None if no samples are exchangeable.

    Args:
        model: The model.
        trainer: A trainer that is fitting it.
        limit: At most so many samples, evenly spaced, or None for all.
        target: A target that gets them, as it keeps them: in its dtype, and of this rank alone if
            it is sharded.
    """
    dtype = target.dtype if isinstance(target, STF) else "float32"

    def encode(positions: Tensor, batch: object) -> Clean:
        raise_if_asked(trainer)  # to encode a large set takes long, and nothing is trained yet
        clean = model.clean(batch)
        check_clean(clean, model.num_classes, positions)
        return replace(clean, x0=as_stored(clean.x0, dtype))

    is_shard = target is not None and target.sharded
    return encoded_training_set(trainer, encode, "Encoding references", limit, is_shard=is_shard)


@torch.no_grad()
def map_references(model: Diffusion, trainer: Trainer, target: STF) -> None:
    """Give a target the stored samples of the training set as its bank.

    Raises:
        ValueError: If the data set has none, or ``encode`` makes other samples of them.
    """
    dataset = training_loader(trainer).dataset
    found = dataset.stored_samples() if isinstance(dataset, SampleDataset) else None
    if found is None:
        raise ValueError(
            f"`storage='data'` needs data whose samples are stored as they are, got a "
            f"{type(dataset).__name__} that makes them: use CachedLatents(posterior='mean'), "
            f"8-bit images that all fit in `cache_bytes`, or storage='memory'."
        )
    parts, labels = found
    labels = labels if model.num_classes is not None else None
    precision = trainer.precision_plugin.forward_context()
    for positions, batch in training_batches(trainer, "Comparing references", _COMPARED):
        with precision:
            clean = model.clean(batch)
        check_clean(clean, model.num_classes, positions)
        if clean.cond is not None or clean.index is None:
            raise ValueError(
                "`storage='data'` needs samples with an index and without a condition besides "
                "class labels: let the data set return `index`, or use storage='memory'."
            )
        rows = as_numbers(torch.cat([part_rows(parts, int(i)) for i in positions]))
        if not torch.equal(clean.x0.cpu(), rows.reshape(clean.x0.shape)):
            raise ValueError(
                "`encode` must return samples as they are stored with storage='data', got "
                "other numbers: use storage='memory', which keeps what `encode` returns."
            )
    target.set_bank(_mapped(parts, labels, target.sharded), indexed=True)
    target.data_version = _data_version(trainer)


def part_rows(parts: Sequence[Tensor], position: int) -> Tensor:
    """Return one row ``(1, *)`` of all parts together."""
    for part in parts:
        if position < len(part):
            return part[position : position + 1]
        position -= len(part)
    raise IndexError(position)


def _mapped(parts: Sequence[Tensor], labels: Tensor | None, sharded: bool) -> Bank:
    ranks = world_size()
    if not sharded or ranks == 1:
        return StoredReferences.prepare(parts, labels)
    own, first = [], 0
    for part in parts:
        own.append(part[(rank() - first) % ranks :: ranks])
        first += len(part)
    labels = None if labels is None else labels[rank() :: ranks]
    return ShardedReferences.stored([part for part in own if len(part) > 0], labels)


def set_references(target: Target, clean: Clean) -> None:
    """Give a target the references that ``read_references`` has read for it."""
    target.fill(
        clean.x0,
        clean.group,
        indexed=clean.index is not None,
        cond_group=clean.cond_group,
        is_shard=target.sharded,
    )
