"""Running sums of a softmax over references, so that parts are summed apart and then merged.

For logits ℓ_k and their maximum M so far the sums are those of ``w_k = e^(ℓ_k - M)``, w_k²,
``w_k r_k`` and ``w_k ‖r_k‖²``. A new maximum M' scales them by ``e^(M - M')``, and sums over two
parts of the references add up once both are scaled to the larger maximum (Milakov and Gimelshein
2018, arXiv 1805.02867).

Weights below e^-60 are set to zero: they change nothing, and as denormal numbers they would make
the second matrix product twice as slow.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_vr.core import devices
from lightning_vr.posterior.low_noise import LowNoiseRows
from lightning_vr.posterior.references import PlainReferences, References, columns
from lightning_vr.posterior.stored_references import StoredReferences
from lightning_vr.posterior.tensor_cores import Product, exact_products

_NEGLIGIBLE = -60.0
"""Log weight relative to the largest below which a weight is set to zero."""

_NO_WEIGHT = math.exp(_NEGLIGIBLE)


@dataclass
class Queries:
    """The noised samples x_t in the form in which sums over references need them.

    Attributes:
        scaled: ``(alpha/sigma²) x_t``, centred as the references, ``(B, d)``.
        curvature: ``alpha²/2sigma²``, ``(B,)``.
        offset: What logits are relative to ``(B,)``: 0, or ``‖x_t‖²/2sigma²`` at low noise.
        own_logit: Logit of the own sample, which is not in the sums, or -inf ``(B,)``.
        exclude: Position of one reference that the row must not use, or -1 ``(B,)``; or None.
        group: Labels of the rows ``(B,)`` or ``(B, k)``, or None.
    """

    scaled: Tensor
    curvature: Tensor
    offset: Tensor
    own_logit: Tensor
    exclude: Tensor | None = None
    group: Tensor | None = None

    @cached_property
    def low_noise(self) -> LowNoiseRows | None:
        """The rows with an offset; None where it is known that there are none."""
        is_known = not devices.host_waits(self.offset.device)
        if self.offset.dtype == torch.float64 or (is_known and not bool(self.offset.any())):
            return None
        return LowNoiseRows(self.scaled, self.curvature, self.offset)


@dataclass
class SoftmaxSums:
    """Sums over references for each of B queries.

    Attributes:
        maximum: Largest logit, relative to the offset, including that of the own sample, ``(B,)``.
        weight: ``Σ w``, ``(B,)``.
        weight_squared: ``Σ w²``, ``(B,)``.
        squared_norms: ``Σ w ‖r‖²``, ``(B,)``.
        count: Number of references that are not masked, ``(B,)``.
        rows: ``Σ w r``, ``(B, d)``.
        logits: ``Σ w ℓ`` with logits relative to the offset ``(B,)``; None while no reference was
            near, as then nothing needs it.
        is_empty: Whether no reference is in the sums yet.
    """

    maximum: Tensor
    weight: Tensor
    weight_squared: Tensor
    squared_norms: Tensor
    count: Tensor
    rows: Tensor
    logits: Tensor | None = None
    is_empty: bool = True

    @classmethod
    def over(
        cls,
        references: References | PlainReferences | StoredReferences,
        queries: Queries,
        chunk_size: int | None,
    ) -> "SoftmaxSums":
        """Sum over references, ``chunk_size`` at a time."""
        a, b, c, d = (torch.zeros_like(queries.own_logit) for _ in range(4))
        sums = cls(queries.own_logit, a, b, c, d, torch.zeros_like(queries.scaled))
        chunks = references.chunks(chunk_size, len(queries.scaled), queries.scaled.dtype)
        with exact_products(queries.scaled) as product:
            for start, rows, norms in chunks:
                logits = product(queries.scaled, rows.T).addr_(queries.curvature, norms, alpha=-1)
                sums.count += _mask(logits, start, queries, references.group)
                sums.add(logits, rows, norms, queries, product)
        return sums

    def add(
        self,
        logits: Tensor,
        rows: Tensor,
        squared_norms: Tensor,
        queries: Queries,
        product: Product = torch.matmul,
    ) -> None:
        """Add references by their ``logits (B, c)``, not relative to offsets; overwrites these."""
        largest, near, low = logits.amax(1), None, queries.low_noise
        if low is not None:
            largest -= low.offset
            near = low.near_logits(logits, largest, self.maximum, rows)
        if near is not None:
            largest = near.largest(largest)
            self.sum_logits(queries)
        finite = self._raise_maximum(largest)
        logits.sub_((finite if low is None else finite + low.offset)[:, None])
        if near is not None:
            near.write(logits, finite)

        # exp takes thirty times as long where it underflows
        logits.clamp_(min=_NEGLIGIBLE - 1, max=0)
        weights = torch.threshold_(logits.exp(), _NO_WEIGHT, 0)
        weight = weights.sum(1)
        self.weight += weight
        if self.logits is not None:
            self.logits += torch.mul(weights, logits, out=logits).sum(1).addcmul_(finite, weight)
        self.weight_squared += torch.mul(weights, weights, out=logits).sum(1)
        self.squared_norms.addmv_(weights, squared_norms)
        if product is torch.matmul:
            self.rows.addmm_(weights, rows)
        else:
            self.rows += product(weights, rows)
        self.is_empty = False

    def sum_logits(self, queries: Queries) -> None:
        """Keep the sum of logits from now on; before, no reference was near and all were right."""
        if self.is_empty:
            self.logits = torch.zeros_like(self.weight)
        elif self.logits is None:
            self.logits = torch.linalg.vecdot(queries.scaled, self.rows)
            self.logits -= queries.curvature * self.squared_norms + queries.offset * self.weight

    def merge(self, other: "SoftmaxSums") -> None:
        """Add the sums over other references, which are scaled to the common maximum."""
        self._raise_maximum(other.maximum)
        other._raise_maximum(self.maximum)
        self.weight += other.weight
        self.weight_squared += other.weight_squared
        self.squared_norms += other.squared_norms
        self.logits = self._sum_of_logits() + other._sum_of_logits()
        self.count += other.count
        self.rows += other.rows

    def packed(self) -> Tensor:
        """Return the sums of each query as one row, ``(B, 6 + d)``."""
        scalars = [self.maximum, self.weight, self.weight_squared, self.squared_norms, self.count]
        return torch.cat([torch.stack([*scalars, self._sum_of_logits()], dim=1), self.rows], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "SoftmaxSums":
        """Return the sums from the rows that ``packed`` made, as views of them."""
        maximum, weight, weight_squared, squared_norms, count, logits = packed[:, :6].unbind(dim=1)
        sums = maximum, weight, weight_squared, squared_norms, count
        return cls(*sums, packed[:, 6:], logits, is_empty=False)

    def _sum_of_logits(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.logits is None else self.logits

    def _raise_maximum(self, other: Tensor) -> Tensor:
        """Scale to the maximum with ``other (B,)``; return that, and 0 where it is -inf."""
        maximum = torch.maximum(self.maximum, other)
        finite = maximum.masked_fill(maximum == -math.inf, 0)
        previous, self.maximum = self.maximum, maximum
        if self.is_empty:
            return finite
        decay = torch.exp(previous - finite)
        self.weight *= decay
        self.weight_squared *= decay**2
        self.squared_norms *= decay
        self.rows *= decay[:, None]
        if self.logits is not None:
            self.logits *= decay
        return finite


def label_mismatch(query_group: Tensor, reference_group: Tensor) -> Tensor:
    """Return which of c references each row must not use for its labels, ``(B, c)``.

    Args:
        query_group: Labels of the rows ``(B,)`` or ``(B, k)``; negative ones match all.
        reference_group: Labels of the references ``(c,)`` or ``(c, k)``.
    """
    found = [
        (wanted[:, None] != given) & (wanted[:, None] >= 0)
        for wanted, given in zip(columns(query_group).T, columns(reference_group).T, strict=True)
    ]
    return torch.stack(found).any(dim=0) if len(found) > 1 else found[0]


def _mask(
    logits: Tensor, start: int, queries: Queries, reference_group: Tensor | None
) -> Tensor | float:
    """Set logits to -inf where a row must not use a reference; return how many it may use."""
    count: Tensor | float = logits.shape[1]
    if queries.exclude is not None:
        position = queries.exclude - start
        place = position.clamp(0, logits.shape[1] - 1)
        inside, place = position == place, place[:, None]
        logits.scatter_(1, place, logits.gather(1, place).masked_fill_(inside[:, None], -math.inf))
        count = logits.shape[1] - inside.to(logits)
    if queries.group is not None and reference_group is not None:
        part = reference_group[start : start + logits.shape[1]]
        logits.masked_fill_(label_mismatch(queries.group, part), -math.inf)
        count = (logits > -math.inf).sum(1)
    return count
