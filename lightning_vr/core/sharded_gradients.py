"""Gradients of sharded parameters, which only a backward pass reaches.

The leaves of such a graph are the gathered parameters, by which ``torch.autograd.grad`` finds
nothing. So the backward pass of each chunk runs as in training, and gradients are reduced over the
ranks with the last chunk alone. What training has accumulated so far is put aside meanwhile.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_vr.core.distributed import SynchronizedError, all_gather_numbers
from lightning_vr.core.rows import Rows, leaves, mapped, row_count, rows_at
from lightning_vr.core.sharding import synchronize_gradients


def sharded_gradients(
    module: nn.Module,
    function: Callable[[Rows], Tensor],
    rows: Rows,
    chunk: int,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return losses of this rank's rows, and gradients of their mean over rows and ranks.

    All ranks must call it. It takes and returns what ``gradients_in_chunks`` does; gradients by the
    trained parameters are sharded as these are, those by the rows are of this rank's mean.

    Raises:
        SynchronizedError: If one has fewer rows than another has chunks.
    """
    rows = mapped(rows, lambda x: x.detach().requires_grad_(x.requires_grad))
    parameters = [p for p in module.parameters() if p.requires_grad]
    inputs = [*parameters, *(x for x in leaves(rows) if x.requires_grad)]
    bounds = _bounds(row_count(rows), chunk)
    kept = [parameter.grad for parameter in parameters]
    losses = []
    try:
        for x in parameters:
            x.grad = None
        for start, stop in bounds:
            synchronize_gradients(module, enabled=stop == bounds[-1][1])
            found = function(rows_at(rows, slice(start, stop)))
            losses.append(found.detach())
            with torch.autocast(found.device.type, enabled=False):
                (found.sum() * (scale / bounds[-1][1])).backward()  # type: ignore[no-untyped-call]
        gradients = [x.grad for x in inputs]
    finally:
        synchronize_gradients(module, enabled=True)
        for x, own in zip(parameters, kept, strict=True):
            x.grad = own
    return torch.cat(losses), [None if g is None else g / scale for g in gradients]


def _bounds(count: int, chunk: int) -> list[tuple[int, int]]:
    """Return where chunks begin and end: equally many on all ranks, as each pass is a collective.

    A rank that has fewer rows than others takes smaller chunks.
    """
    own = -(-count // chunk)
    everyone = all_gather_numbers([own, count])
    number, least = max(n for n, _ in everyone), min(rows for _, rows in everyone)
    if number > least:
        raise SynchronizedError(
            f"A batch of sharded training must have at least {number} rows on each rank, as many "
            f"as a rank has chunks, got {least}: give all ranks batches of the same size."
        )
    # as without shards where that gives as many: dropout draws by the shapes of chunks
    ends = [min(i * chunk, count) if own == number else i * count // number for i in range(number)]
    return list(itertools.pairwise([*ends, count]))
