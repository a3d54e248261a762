"""References that are sharded over the ranks: each rank has a shard, and all answer every query.

Each of W ranks has n/W of the n references. A rank's queries go to all ranks, each computes the
softmax sums of its shard (``streamed_softmax.py``), and the sums come back: a rank sends and
receives about ``2 B d`` numbers for B queries of all ranks, whatever n is. Reference p of a data
set is in row ``p // W`` on rank ``p % W``, the rank that has read it. A subset keeps its rows on
their ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_vr.core.distributed import (
    SynchronizedError,
    all_gather_numbers,
    all_reduce_sum,
    broadcast,
    exchange_rows,
    gather_rows,
    rank,
    row_counts,
    world_size,
)
from lightning_vr.core.validation import check_samples
from lightning_vr.posterior.references import References, columns, flat_rows
from lightning_vr.posterior.stored_references import StoredReferences, mean_of_some
from lightning_vr.posterior.streamed_softmax import Queries, SoftmaxSums


@dataclass(frozen=True)
class ShardedReferences:
    """One rank's shard of prepared references; methods that involve all of them are collectives.

    Attributes:
        local: This rank's references, centred by the mean of all.
        positions: Their positions among all references ``(m,)``, int64, ascending.
        size: n, the number of references on all ranks.
    """

    local: References | StoredReferences
    positions: Tensor
    size: int

    @classmethod
    def prepare(
        cls, x: Tensor, group: Tensor | None = None, *, in_place: bool = False
    ) -> "ShardedReferences":
        """Centre this rank's references by the mean of all; all ranks must call it.

        Args:
            x: References ``rank, rank + W, ...`` of all, ``(m, *)``.
            group: Their labels ``(m,)`` or ``(m, k)``, or None.
            in_place: Whether to centre ``x`` itself, so that no second copy of it is made.

        Raises:
            ValueError: If ``x`` is not this rank's shard, or a rank has none.
        """
        size = _total(len(x))
        check_samples("references", x)
        flat = flat_rows(x)
        positions = torch.arange(rank(), size, world_size(), device=x.device)
        if len(positions) != len(flat):
            raise ValueError(
                f"`x` must be every {world_size()}th of {size} references, {len(positions)} on "
                f"rank {rank()}, got {len(flat)}: give rank r the references r, r + W, r + 2 W, ..."
            )
        centre = all_reduce_sum(flat.sum(dim=0)) / size
        rows = flat.sub_(centre) if in_place else flat - centre
        return cls(References.centred(rows, centre, group), positions, size)

    @classmethod
    def stored(cls, x: Sequence[Tensor], group: Tensor | None = None) -> "ShardedReferences":
        """Keep this rank's references as they are stored; all ranks must call it.

        Args:
            x: References ``rank, rank + W, ...`` of all, in order, ``(m, *)`` each.
            group: Their labels ``(m,)`` or ``(m, k)``, or None.

        Raises:
            ValueError: If a rank has none.
        """
        size = _total(sum(map(len, x)))
        centre = all_reduce_sum(mean_of_some([part.flatten(1) for part in x])) / world_size()
        local = StoredReferences.prepare(x, group, centre)
        return cls(local, torch.arange(rank(), size, world_size(), device=centre.device), size)

    def __deepcopy__(self, memo: dict[int, object]) -> "ShardedReferences":
        return self  # references are never changed: copies of a module share them

    def __len__(self) -> int:
        return self.size

    def rows_at(self, positions: Tensor) -> Tensor:
        """Return the rows of ``local`` at ``positions (m,)`` of all, -1 for other ranks'."""
        row = torch.searchsorted(self.positions, positions.contiguous())
        at_row = torch.cat([self.positions, self.positions.new_tensor([-1])])[row]
        return torch.where((at_row == positions) & (positions >= 0), row, -1)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks; all must call it."""
        return all_reduce_sum(x)

    def from_rank_zero(self, x: Tensor) -> Tensor:
        """Return the first rank's ``x``; all ranks must call it."""
        return broadcast(x)

    def at_origin(self) -> "ShardedReferences":
        """Return the references moved so that their centre is the origin."""
        assert isinstance(self.local, References)  # stored ones are taken first
        return replace(self, local=self.local.at_origin())

    def take(self, index: Tensor) -> "ShardedReferences":
        """Return the references at ``index (m,)``, the same on all ranks, centred as before."""
        row = self.rows_at(index)
        positions = (row >= 0).nonzero().squeeze(1)
        return ShardedReferences(self.local.take(row[positions]), positions, len(index))

    def prefetch(self, index: Tensor) -> None:
        """Begin to read this rank's share of the references at ``index (m,)``, for ``take``."""
        row = self.rows_at(index)
        self.local.prefetch(row[row >= 0])

    def to(self, device: torch.device) -> "ShardedReferences":
        """Return the same references on ``device``."""
        return replace(self, local=self.local.to(device), positions=self.positions.to(device))


def _total(count: int) -> int:
    """Return how many references all ranks have."""
    counts = row_counts(count)
    if 0 in counts:
        raise SynchronizedError(
            f"`sharded` must be False with fewer references than processes, got {sum(counts)} for "
            f"{len(counts)}: keep all of them on each."
        )
    return sum(counts)


Bank: TypeAlias = References | StoredReferences | ShardedReferences
"""References prepared for many calls, all on each rank or sharded over the ranks."""


def distances_to_copies(bank: Bank, x: Tensor, positions: Tensor | None) -> Tensor:
    """Return how far samples are from the references at their positions, by the references' norm.

    Args:
        bank: References.
        x: Samples ``(B, *)``.
        positions: Their positions among the references ``(B,)``; if not known, None, which takes
            the nearest reference, and the bank must be that of all ranks.

    Returns:
        Distances ``(m,)`` of those samples whose references are on this rank.
    """
    local = bank.local
    row = _nearest_rows(local, x) if positions is None else bank.rows_at(positions.to(x.device))
    here = row >= 0
    copies = local.take(row[here]).rows + local.centre
    norm = torch.sqrt(local.squared_norms.mean() + torch.linalg.vecdot(local.centre, local.centre))
    distance: Tensor = torch.linalg.vector_norm(flat_rows(x)[here] - copies, dim=1) / norm
    return distance


def sums_over_ranks(
    references: ShardedReferences, queries: Queries, chunk_size: int | None
) -> SoftmaxSums:
    """Return the sums over the references of all ranks for this rank's queries.

    All ranks must call it, also one without queries.

    Raises:
        ValueError: On all ranks, if their queries differ in more than their number.
    """
    counts, asked = _gathered(references, queries)
    local = SoftmaxSums.over(references.local, asked, chunk_size)
    if sum(counts) == 0:
        return local
    if asked.low_noise is not None:
        local.sum_logits(asked)  # a reference of another rank may be near
    first, *others = map(SoftmaxSums.unpacked, exchange_rows(local.packed(), counts))
    for other in others:
        first.merge(other)
    return first


def _gathered(references: ShardedReferences, queries: Queries) -> tuple[list[int], Queries]:
    """Return how many queries each rank has, and the queries of all for ``references.local``."""
    count, device = len(queries.scaled), queries.scaled.device
    nothing = torch.full((count,), -1, device=device)
    exclude = nothing if queries.exclude is None else queries.exclude
    labels = [] if queries.group is None else [columns(queries.group)]
    integers = torch.cat([exclude[:, None], *labels], dim=1)
    scalars = [queries.curvature, queries.offset, queries.own_logit]
    numbers = torch.cat([torch.stack(scalars, dim=1), queries.scaled], dim=1)

    kinds = all_gather_numbers([integers.shape[1] - 1, numbers.element_size(), count])
    if len({(labels, size) for labels, size, _ in kinds}) > 1:
        raise ValueError(
            f"`xt` must have one dtype and one number of labels on all ranks, got [labels, bytes "
            f"per number, rows] of {kinds}: use the same dtype and labels on all ranks."
        )
    counts = [count for _, _, count in kinds]
    if sum(counts) > 0:
        integers, numbers = gather_rows(integers, counts), gather_rows(numbers, counts)
    excluded = references.rows_at(integers[:, 0])
    group = integers[:, 1:] if labels else None
    curvature, offset, own_logit = numbers[:, :3].T
    return counts, Queries(numbers[:, 3:], curvature, offset, own_logit, excluded, group)


def _nearest_rows(references: References | StoredReferences, x: Tensor) -> Tensor:
    centred = flat_rows(x).to(references.centre) - references.centre
    least = torch.full_like(centred[:, 0], torch.inf)
    nearest = torch.zeros_like(least, dtype=torch.int64)
    for start, rows, norms in references.chunks(None, len(centred), centred.dtype):
        length, row = (0.5 * norms - centred @ rows.mT).min(1)
        nearest = torch.where(length < least, start + row, nearest)
        least = torch.minimum(length, least)
    return nearest
