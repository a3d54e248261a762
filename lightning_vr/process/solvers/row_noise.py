"""Noise that belongs to a row: what a sample gets does not depend on the batch that it is in.

The rows of all samples are cut into blocks, and each block has a generator of its own, keyed by one
number that is drawn from the caller's generator. A batch draws the blocks that it touches and keeps
its rows, so that any batch size gives the same noise.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from lightning_vr.core.rng import generator

BLOCK = 64
"""Rows that share a generator: few enough to waste little at the ends of a batch."""


class NoiseKey:
    """One number from a generator, drawn when it is first asked for.

    Args:
        source: The generator; torch's global one if None.
    """

    def __init__(self, source: torch.Generator | None) -> None:
        self._source = source

    @cached_property
    def value(self) -> int:
        """The number, the same from then on."""
        device = "cpu" if self._source is None else self._source.device
        return int(torch.randint(2**62, (), generator=self._source, device=device))


class RowNoise:
    """The noise of the rows ``start .. stop - 1``.

    Args:
        key: What all rows share.
        start: The first row.
        stop: The row after the last one.
    """

    def __init__(self, key: NoiseKey, start: int, stop: int) -> None:
        self._key, self._start, self._stop = key, start, stop
        self._blocks: list[torch.Generator] = []

    def like(self, x: Tensor) -> Tensor:
        """Return new standard normal numbers for ``x (stop - start, *)``."""
        first = self._start // BLOCK
        if not self._blocks:
            blocks = range(first, (self._stop - 1) // BLOCK + 1)
            self._blocks = [generator(self._key.value, block, device=x.device) for block in blocks]
        shape = (BLOCK, *x.shape[1:])
        drawn = [torch.randn(shape, generator=own, device=x.device) for own in self._blocks]
        offset = first * BLOCK
        return torch.cat(drawn)[self._start - offset : self._stop - offset].to(x.dtype)

    def generators(self, device: torch.device) -> Iterator[torch.Generator]:
        """Yield a generator for each row, for code that draws the noise itself."""
        for row in range(self._start, self._stop):
            yield generator(self._key.value, "row", row, device=device)
