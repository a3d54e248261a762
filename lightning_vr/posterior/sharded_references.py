"""References that the ranks share out: each holds its part, and all answer every query.

Of the n references W ranks hold n/W each. A rank's queries go to all ranks, each sums its own part
of the softmax (``softmax_sums``), and the sums come back: a rank sends and receives about ``2 B d``
numbers for B queries of all ranks, whatever n is. Rank ``p % W`` holds reference p of a data set
in row ``p // W``, as it has read it. A subset keeps its rows where they are.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_vr.core.distributed import (
    all_gather_numbers,
    all_reduce_sum,
    broadcast,
    exchange_rows,
    gather_rows,
    rank,
    world_size,
)
from lightning_vr.posterior.references import References, check_samples, columns, flat_rows
from lightning_vr.posterior.streamed_softmax import Queries, SoftmaxSums


@dataclass(frozen=True)
class ShardedReferences:
    """One rank's part of prepared references; what has to do with all of them is a collective.

    Attributes:
        local: This rank's references, centred as on all ranks.
        positions: Where these stand among all references ``(m,)``, int64, ascending.
        size: n, the number of references on all ranks.
    """

    local: References
    positions: Tensor
    size: int

    @classmethod
    def prepare(
        cls, x: Tensor, group: Tensor | None = None, *, in_place: bool = False
    ) -> "ShardedReferences":
        """Centre this rank's references by the mean of all; all ranks must call it.

        Args:
            x: The references number ``rank, rank + W, ...`` of all, ``(m, *)``.
            group: Their labels ``(m,)`` or ``(m, k)``, or None.
            in_place: Whether to centre ``x`` itself, so that there is never a second copy of it.

        Raises:
            ValueError: If ``x`` is not this rank's part.
        """
        check_samples("references", x)
        flat = flat_rows(x)
        size = int(all_reduce_sum(torch.tensor(len(flat), device=x.device)))
        positions = torch.arange(rank(), size, world_size(), device=x.device)
        if len(positions) != len(flat):
            raise ValueError(
                f"Argument `x` expected to be every {world_size()}th of {size} references, "
                f"{len(positions)} on rank {rank()}, but got {len(flat)}."
            )
        centre = all_reduce_sum(flat.sum(dim=0)) / size
        rows = flat.sub_(centre) if in_place else flat - centre
        return cls(References.centred(rows, centre, group), positions, size)

    def __deepcopy__(self, memo: dict[int, object]) -> "ShardedReferences":
        return self  # nothing changes references: copies of a module share them

    def __len__(self) -> int:
        return self.size

    def rows_at(self, positions: Tensor) -> Tensor:
        """Return the rows of ``local`` at ``positions (m,)`` of all, -1 where others hold them."""
        row = torch.searchsorted(self.positions, positions.contiguous())
        at_row = torch.cat([self.positions, self.positions.new_tensor([-1])])[row]
        return torch.where((at_row == positions) & (positions >= 0), row, -1)

    def total(self, x: Tensor) -> Tensor:
        """Add up ``x`` over the ranks; all must call it."""
        return all_reduce_sum(x)

    def from_rank_zero(self, x: Tensor) -> Tensor:
        """Return the first rank's ``x``; all ranks must call it."""
        return broadcast(x)

    def at_origin(self) -> "ShardedReferences":
        """Return the references moved so that their centre is the origin."""
        return replace(self, local=self.local.at_origin())

    def take(self, index: Tensor) -> "ShardedReferences":
        """Return the references at ``index (m,)``, the same on all ranks, centred as before."""
        row = self.rows_at(index)
        positions = (row >= 0).nonzero().squeeze(1)
        return ShardedReferences(self.local.take(row[positions]), positions, len(index))

    def to(self, device: torch.device) -> "ShardedReferences":
        """Return the same references on ``device``."""
        return replace(self, local=self.local.to(device), positions=self.positions.to(device))


Bank: TypeAlias = References | ShardedReferences
"""References prepared for many calls, all of them on each rank or shared out."""


def sums_over_ranks(
    references: ShardedReferences, queries: Queries, chunk_size: int | None
) -> SoftmaxSums:
    """Return the sums over the references of all ranks for this rank's queries.

    All ranks must call it, also one that has none to ask.

    Raises:
        ValueError: On all ranks, if their queries differ in more than their number.
    """
    counts, asked = _gathered(references, queries)
    local = SoftmaxSums.over(references.local, asked, chunk_size)
    if sum(counts) == 0:
        return local
    first, *others = map(SoftmaxSums.unpacked, exchange_rows(local.packed(), counts))
    for other in others:
        first.merge(other)
    return first


def _gathered(references: ShardedReferences, queries: Queries) -> tuple[list[int], Queries]:
    """Return how many queries each rank has, and all of them, to ask of ``references.local``."""
    count, device = len(queries.scaled), queries.scaled.device
    nothing = torch.full((count,), -1, device=device)
    exclude = nothing if queries.exclude is None else queries.exclude
    labels = [] if queries.group is None else [columns(queries.group)]
    integers = torch.cat([exclude[:, None], *labels], dim=1)
    scalars = torch.stack([queries.curvature, queries.own_logit], dim=1)
    numbers = torch.cat([scalars, queries.scaled], dim=1)

    kinds = all_gather_numbers([integers.shape[1] - 1, numbers.element_size(), count], device)
    if len({(labels, size) for labels, size, _ in kinds}) > 1:
        raise ValueError(
            f"Argument `xt` expected to have one dtype and one number of labels on all ranks, but "
            f"got [labels, bytes of a number, rows] of {kinds}: call it alike on all ranks."
        )
    counts = [count for _, _, count in kinds]
    if sum(counts) > 0:
        integers, numbers = gather_rows(integers, counts), gather_rows(numbers, counts)
    (curvature, own_logit), scaled = numbers[:, :2].T, numbers[:, 2:]
    group = integers[:, 1:] if labels else None
    return counts, Queries(scaled, curvature, own_logit, references.rows_at(integers[:, 0]), group)
