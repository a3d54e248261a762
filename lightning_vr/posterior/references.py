"""References of a posterior mean, prepared once: centred, with their squared norms.

Logits ``(alpha/sigma²) x·r - (alpha²/2sigma²) ‖r‖²`` need the references and their squared norms.
Centring them by their mean costs nothing and removes a common part that float32 would spend its
digits on; distances do not change.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_vr.core.validation import check_samples

_ON_CPU = (1 << 20, 3 << 21)
"""Most logits, and numbers of references, in a chunk: these stay in the cache for both products."""

_ON_ACCELERATOR = (1 << 24, 1 << 27)
"""The same where each chunk costs a launch of every kernel, and memory is large."""


_Whole = TypeVar("_Whole", bound="WholeReferences")


class WholeReferences:
    """References that are all on this rank."""

    def __deepcopy__(self: _Whole, memo: dict[int, object]) -> _Whole:
        return self  # references are never changed: copies of a module share them

    @property
    def local(self: _Whole) -> _Whole:
        """The references on this rank: all of them."""
        return self

    def rows_at(self, positions: Tensor) -> Tensor:
        """Return the rows of ``local`` at ``positions (m,)`` of all references."""
        return positions

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks with shards of the references: ``x`` itself."""
        return x

    def from_rank_zero(self, x: Tensor) -> Tensor:
        """Return the first rank's ``x``, where ranks have shards of references: ``x`` itself."""
        return x

    def prefetch(self, index: Tensor) -> None:
        """Begin to read the references at ``index (m,)``, for ``take``; those in memory are."""


@dataclass(frozen=True)
class References(WholeReferences):
    """Prepared references, ready for many calls of ``posterior_mean``.

    Attributes:
        rows: References less ``centre``, ``(n, d)``.
        squared_norms: ``‖rows‖²``, ``(n,)``.
        centre: What was subtracted, ``(d,)``.
        group: Labels of the references ``(n,)``, or several of each ``(n, k)``, or None.
    """

    rows: Tensor
    squared_norms: Tensor
    centre: Tensor
    group: Tensor | None = None

    @classmethod
    def prepare(cls, x: Tensor, group: Tensor | None = None) -> "References":
        """Centre ``x (n, *)`` and keep its squared norms, in float32 or better."""
        check_samples("references", x)
        flat = flat_rows(x)
        centre = flat.mean(dim=0)
        return cls.centred(flat - centre, centre, group)

    @classmethod
    def centred(cls, rows: Tensor, centre: Tensor, group: Tensor | None = None) -> "References":
        """Keep the squared norms of ``rows (n, d)`` that ``centre (d,)`` is subtracted from."""
        return cls(rows, torch.linalg.vector_norm(rows, dim=1).square_(), centre, group)

    def __len__(self) -> int:
        return len(self.rows)

    def at_origin(self) -> "References":
        """Return the references moved so that their centre is the origin."""
        return replace(self, centre=torch.zeros_like(self.centre))

    def take(self, index: Tensor) -> "References":
        """Return the references at ``index (m,)``, centred as before."""
        group = None if self.group is None else self.group[index]
        return References(self.rows[index], self.squared_norms[index], self.centre, group)

    def to(self, device: torch.device) -> "References":
        """Return the same references on ``device``."""
        group = None if self.group is None else self.group.to(device)
        return References(
            self.rows.to(device), self.squared_norms.to(device), self.centre.to(device), group
        )

    def chunks(
        self, size: int | None, queries: int, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield ``(start, rows, squared_norms)`` of consecutive references."""
        size = size or chunk_length(queries, self.rows.shape[1], self.rows.device)
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield start, self.rows[part].to(dtype), self.squared_norms[part].to(dtype)


class PlainReferences(WholeReferences):
    """References for a single call: centred chunk by chunk, so that no copy of all is made.

    The centre is the mean of a few of them, and the origin where that lies within one standard
    deviation: there centring would cost a pass over the references and gain less than one bit.
    """

    def __init__(self, x: Tensor, group: Tensor | None, dtype: torch.dtype) -> None:
        self.x, self.group, self.dtype = x, group, dtype
        some = x[:: max(1, len(x) // 64)].to(dtype)
        centre = some.mean(dim=0)
        is_near = bool(centre.square().sum() <= (some - centre).square().sum(1).mean())
        self.centre = torch.zeros_like(centre) if is_near else centre
        self.is_centred = is_near and x.dtype == dtype

    def __len__(self) -> int:
        return len(self.x)

    def chunks(
        self, size: int | None, queries: int, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield ``(start, rows, squared_norms)`` of consecutive references."""
        size = min(len(self), size or chunk_length(queries, self.x.shape[1], self.x.device))
        copy = self.x.new_empty(0 if self.is_centred else size, self.x.shape[1], dtype=dtype)
        for start in range(0, len(self), size):
            rows = self.x[start : start + size]
            if not self.is_centred:
                rows = torch.sub(rows, self.centre, out=copy[: len(rows)])
            yield start, rows, torch.linalg.vector_norm(rows, dim=1).square_()


def chunk_length(queries: int, dim: int, device: torch.device) -> int:
    """Return how many references to compare with the queries at a time, by default."""
    logits, numbers = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
    return max(1, min(logits // max(1, queries), numbers // max(1, dim)))


def flat_rows(x: Tensor) -> Tensor:
    """Return ``x (n, *)`` as rows ``(n, d)``, in float32 or better."""
    flat = x.detach().flatten(1)
    return flat if flat.dtype == torch.float64 else flat.float()


def columns(group: Tensor) -> Tensor:
    """Return labels ``(n,)`` or ``(n, k)`` as ``(n, k)``."""
    return group if group.ndim == 2 else group[:, None]
