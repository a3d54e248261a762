"""References that are kept as they are stored, for banks that do not fit in float32 or in memory.

The rows may be bfloat16, float16 or 8-bit pixels, in memory or mapped from files, and in several
parts. A chunk is read, made float32 and centred when it is asked for; on the CPU a thread does so
for the next one meanwhile, and after the last for the first of the next step. Drawn references are
read in that thread too, if ``prefetch`` was told which ones.

Rounding moves a reference by ``δ``, bfloat16 by at most ``2^-8 |r|`` in each number. Pixels of 8
bits are not rounded by uint8, nor are rows that were read from such files. The own sample stays as
it was noised, so the others are exchangeable with it only up to δ. To first order the target of STF
is biased by ``Σ_j w_j (1 - w_j) (δ_j + Δ_j (r_j - m))`` about the posterior mean m, where

    Δ_j = (alpha/sigma²) (x_t - alpha r_j)·δ_j - (alpha²/2sigma²) ‖δ_j‖²

is the change of a logit. Under the posterior the first term has a standard deviation of about
``alpha ‖δ_j‖/sigma``, and ``‖δ_j‖`` is about ``0.0016 ‖r_j‖``. So the bias is of that size, times
the distances of references that share the weight, and vanishes where the own sample has it all.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_vr.posterior.references import References, WholeReferences, chunk_length

StoredDtype = Literal["float32", "bfloat16", "uint8"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
_CENTRED_BY = 4096
"""The centre is the mean of about so many rows: it only has to be near their mean."""


def as_stored(x: Tensor, dtype: StoredDtype) -> Tensor:
    """Return samples in the dtype that they are stored in; float64 and stored ones stay.

    Raises:
        ValueError: If samples are no numbers of [-1, 1] where these are to become 8-bit pixels.
    """
    if dtype == "float32" or x.dtype == _DTYPES[dtype]:
        return x
    if dtype == "bfloat16":
        return x.to(torch.bfloat16)
    if not bool(x.abs().max() <= 1):
        raise ValueError(
            f"`dtype` must be 'float32' or 'bfloat16' unless samples are pixels in [-1, 1], got "
            f"'uint8' and samples up to {float(x.abs().max()):.4g}: use 'bfloat16'."
        )
    return x.add(1).mul_(127.5).round_().to(torch.uint8)


def as_numbers(stored: Tensor) -> Tensor:
    """Return stored samples in float32."""
    numbers = stored.float()
    return _from_levels(numbers) if stored.dtype == torch.uint8 else numbers


def _from_levels(x: Tensor) -> Tensor:
    """Turn levels of 8 bits into numbers of [-1, 1], in place."""
    return x.div_(127.5).sub_(1)


_Found = tuple[object, Tensor]
"""What was read, and the rows."""


class _Ahead:
    """Reads what is asked for next in a thread, chunks in turn into two; pickles read anew."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._next: Future[_Found] | None = None
        self._chunks: list[Tensor] = []

    def __reduce__(self) -> tuple[type["_Ahead"], tuple[()]]:
        return (_Ahead, ())

    def read(self, key: object, read: Callable[[], _Found]) -> Tensor:
        """Return the rows that ``read`` finds, from the thread if that has read this ``key``."""
        begun, self._next = self._next, None
        ready = None if begun is None else begun.result()  # it writes into a chunk
        return ready[1] if ready is not None and ready[0] == key else read()[1]

    def begin(self, read: Callable[[], _Found]) -> None:
        """Begin to read in the thread; what goes wrong there the next ``read`` raises."""
        self._pool = self._pool or ThreadPoolExecutor(1, "references")
        self._next = self._pool.submit(read)

    def chunk(self, size: int, like: Tensor) -> Tensor:
        """Return the chunk of the last but one call, or a new one if that is too small."""
        if len(self._chunks) == 2:
            last = self._chunks.pop(0)
            new = last if len(last) >= size else like.new_empty(size, len(like))
        else:
            new = like.new_empty(size, len(like))
        self._chunks.append(new)
        return new


@dataclass(frozen=True)
class StoredReferences(WholeReferences):
    """Prepared references whose rows are read from where they are stored, chunk by chunk.

    Attributes:
        parts: The rows as they are stored, in order, ``(m, d)`` each.
        squared_norms: ``‖rows - centre‖²``, ``(n,)``.
        centre: What is subtracted, ``(d,)``.
        group: Labels of the references ``(n,)``, or several of each ``(n, k)``, or None.
    """

    parts: tuple[Tensor, ...]
    squared_norms: Tensor
    centre: Tensor
    group: Tensor | None = None
    _ahead: _Ahead = field(default_factory=_Ahead, compare=False, repr=False)

    @classmethod
    def prepare(
        cls, x: Sequence[Tensor], group: Tensor | None = None, centre: Tensor | None = None
    ) -> "StoredReferences":
        """Read all rows once, for their squared norms.

        Args:
            x: Samples as they are stored, in order, ``(m, *)`` each: float32, float16, bfloat16, or
                uint8 for pixels in [-1, 1].
            group: Labels of all ``(n,)`` or ``(n, k)``, or None.
            centre: About the mean of the samples ``(d,)``; if None, that of some of them.
        """
        parts = tuple(part.detach().flatten(1) for part in x)
        centre = mean_of_some(parts) if centre is None else centre
        found = cls(parts, centre.new_empty(sum(map(len, parts))), centre, group)
        for start, rows, _ in found.chunks(None, 1, torch.float32):
            norms = torch.linalg.vector_norm(rows, dim=1).square_()
            found.squared_norms[start : start + len(rows)] = norms
        return found

    def __len__(self) -> int:
        return len(self.squared_norms)

    def take(self, index: Tensor) -> References:
        """Read the references at ``index (m,)`` alone, centred as before."""
        numbers = self._ahead.read(index.tolist(), partial(self._gather, index))
        rows = numbers.to(self.centre.device).sub_(self.centre)
        group = None if self.group is None else self.group[index]
        return References(rows, self.squared_norms[index], self.centre, group)

    def prefetch(self, index: Tensor) -> None:
        """Begin to read the references at ``index (m,)`` in a thread, for the next ``take``."""
        self._ahead.begin(partial(self._gather, index))

    def to(self, device: torch.device) -> "StoredReferences":
        """Return the same references on ``device``; rows on the CPU stay there, and are sent."""
        group = None if self.group is None else self.group.to(device)
        return replace(
            self,
            squared_norms=self.squared_norms.to(device),
            centre=self.centre.to(device),
            group=group,
            _ahead=_Ahead(),
        )

    def chunks(
        self, size: int | None, queries: int, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield ``(start, rows, squared_norms)`` of consecutive references, centred.

        Rows are those of the chunk until the next one is asked for, of one pass at a time.
        """
        size = min(len(self), size or chunk_length(queries, len(self.centre), self.centre.device))
        starts = range(0, len(self), size)
        for start in starts:
            rows = self._ahead.read((start, size), partial(self._read, start, size))
            if self.centre.device.type == "cpu":
                following = (start + size) if start != starts[-1] else 0
                self._ahead.begin(partial(self._read, following, size))
            yield start, rows.to(dtype), self.squared_norms[start : start + size].to(dtype)

    def _gather(self, index: Tensor) -> _Found:
        place, start = index.to(self.parts[0].device), 0
        numbers = torch.empty(len(place), len(self.centre), device=place.device)
        for part in self.parts:
            here = ((place >= start) & (place < start + len(part))).nonzero().squeeze(1)
            if len(here) > 0:
                # in order, as a disk is read
                order = here[place[here].argsort()]
                numbers[order] = as_numbers(part[place[order] - start])
            start += len(part)
        return place.tolist(), numbers

    def _read(self, start: int, size: int) -> _Found:
        stop = min(start + size, len(self))
        rows, first = self._ahead.chunk(size, self.centre)[: stop - start], 0
        for part in self.parts:
            low, high = max(start, first), min(stop, first + len(part))
            if low < high:
                rows[low - start : high - start] = part[low - first : high - first]
            first += len(part)
        if self.parts[0].dtype == torch.uint8:
            _from_levels(rows)
        return (start, size), rows.sub_(self.centre)


def mean_of_some(parts: Sequence[Tensor]) -> Tensor:
    """Return the mean ``(d,)`` of rows that are evenly spaced over the parts, in float32."""
    step = max(1, sum(map(len, parts)) // _CENTRED_BY)
    some = [as_numbers(part[::step]).sum(dim=0, dtype=torch.float64) for part in parts]
    return (sum(some) / sum(len(part[::step]) for part in parts)).float()  # type: ignore[union-attr]
