"""Collectives that are the identity on one process.

Without an initialised process group of two ranks or more each function returns its input, so that
the layers above are written once.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without DDP."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 without DDP."""
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
    return gather_rows(x, [count for (count,) in all_gather_numbers([len(x)], x.device)])


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Do what ``all_gather_rows`` does, where the ``counts`` of rows on all ranks are known."""
    if world_size() == 1:
        return x
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:n] for rows, n in zip(gathered, counts, strict=True)])


def all_gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the numbers of each rank, in rank order; all give equally many."""
    if world_size() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, device=device)
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered).tolist()


def exchange_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Send every rank its rows, and return what all have sent to this one, without gradient.

    Args:
        x: The rows for each rank, in rank order ``(sum of counts, *)``.
        counts: How many rows each rank gets, the same on all ranks.

    Returns:
        ``(W, counts[rank], *)``, what each of the W ranks has sent.
    """
    if world_size() == 1:
        return x[None]
    own = counts[rank()]
    received = x.new_empty(world_size() * own, *x.shape[1:])
    # gloo has no true reduce-scatter, and all-to-all has the same traffic
    dist.all_to_all_single(received, x.detach().contiguous(), [own] * world_size(), list(counts))
    return received.reshape(world_size(), own, *x.shape[1:])


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


def least(number: int, device: torch.device) -> int:
    """Return the smallest of the ranks' numbers."""
    return min(own for (own,) in all_gather_numbers([number], device))


def broadcast(x: Tensor) -> Tensor:
    """Return rank 0's ``x`` on every rank."""
    if world_size() == 1:
        return x
    shared = x.detach().clone()
    dist.broadcast(shared, src=0)
    return shared


def row_offset(count: int, device: torch.device) -> int:
    """Return where this rank's ``count`` rows begin in ``all_gather_rows``."""
    return sum(number for (number,) in all_gather_numbers([count], device)[: rank()])


def gather_objects(found: Any) -> list[Any]:
    """Return what each rank has found, in rank order; anything that pickles."""
    if world_size() == 1:
        return [found]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, found)
    return everyone


def destroy_process_group() -> None:
    """Leave the process group once all ranks are done; all of them call it.

    At the end of a process gloo may wait for ranks that have left, or abort.
    """
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


class SynchronizedError(ValueError):
    """An error that all ranks raise at the same place."""


def ranks_save_together() -> bool:
    """Return whether all ranks are saving, rather than one alone after an error of its own.

    A rank that saves alone would wait for ever in a collective. A signal to stop, which Lightning
    raises as a kind of ``SystemExit``, reaches all ranks.
    """
    kind = sys.exc_info()[0]
    return world_size() == 1 or kind is None or issubclass(kind, (SystemExit, SynchronizedError))
