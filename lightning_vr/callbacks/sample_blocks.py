"""Generated samples of all ranks, in blocks that do not depend on the number of ranks."""

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_vr.callbacks.after_validation import AfterValidation
from lightning_vr.core.distributed import rank, world_size
from lightning_vr.core.progress import progress_bar

_BLOCK = 250
"""Samples generated at a time. Their noise does not depend on the number of ranks."""


def sample_blocks(
    callback: AfterValidation,
    trainer: Trainer,
    module: LightningModule,
    count: int,
    key: str,
    start: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Yield what this rank generates of ``count`` samples, a block at a time.

    Args:
        callback: The callback whose ``generate`` is called.
        trainer: Its trainer.
        module: The module to sample from.
        count: Number of samples of all ranks.
        key: The stream of samples.
        start: Number of the first sample in the stream.

    Yields:
        The number of a block's first sample, from ``start`` on, and the block.
    """
    starts = range(start + rank() * _BLOCK, start + count, world_size() * _BLOCK)
    is_shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    for first in progress_bar(starts, "Sampling", is_shown=is_shown):
        size = min(_BLOCK, start + count - first)
        yield first, callback.generate(module, size, key, first)
