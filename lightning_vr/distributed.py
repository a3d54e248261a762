"""Collectives that are the identity on one process.

Without an initialised process group of two ranks or more each function returns its input, so that
the layers above are written once.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 off DDP."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 off DDP."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, without gradient.

    Args:
        x: ``(B, *)``; B may differ between the ranks, the other sizes may not.

    Returns:
        ``(sum of B, *)``, the same on every rank.
    """
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    longest = max(int(count) for count in counts)
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: len(x)] = x.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[: int(n)] for rows, n in zip(gathered, counts, strict=True)])


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum ``x`` over the ranks, without gradient."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean of ``x`` over the ranks, without gradient."""
    return all_reduce_sum(x) / world_size()


def broadcast(x: Tensor) -> Tensor:
    """Return rank 0's ``x`` on every rank."""
    if world_size() == 1:
        return x
    shared = x.detach().clone()
    dist.broadcast(shared, src=0)
    return shared


def row_offset(count: int, device: torch.device) -> int:
    """Return where this rank's ``count`` rows begin in ``all_gather_rows``."""
    if world_size() == 1:
        return 0
    counts = all_gather_rows(torch.tensor([[count]], device=device))
    return int(counts[: rank()].sum())
