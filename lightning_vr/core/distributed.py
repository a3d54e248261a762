"""Collectives that are the identity on one process.

Without an initialised process group of two ranks or more each function returns its input, so that
the layers above are written once. The same holds on a rank that has failed alone and has left.

Numbers that Python needs (counts, signals) are exchanged on the CPU, by a process group of its own
where that of the tensors needs a GPU: reading them does not wait for the device.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_is_initialized = dist.is_initialized if dist.is_available() else bool


class _State:
    """What this process keeps for the process group ``world``."""

    world: dist.ProcessGroup | None = None
    numbers: dist.ProcessGroup | None = None
    has_left = False


def _state() -> type[_State]:
    """Return the state, empty for a process group that is new."""
    if _State.world is not dist.group.WORLD:
        _State.world, _State.numbers, _State.has_left = dist.group.WORLD, None, False
    return _State


def process_count() -> int:
    """Return the number of ranks that were started, 1 without DDP."""
    return dist.get_world_size() if dist.is_available() and _is_initialized() else 1


def world_size() -> int:
    """Return the number of ranks that act together, 1 without DDP or once this rank has left."""
    count = process_count()
    return 1 if count > 1 and _state().has_left else count


def leave_ranks() -> None:
    """Make each further collective the identity, on a rank that fails alone and is about to end.

    The others do not take part in what this rank still does, such as saving a checkpoint. Metrics
    that a checkpoint needs synchronize themselves wherever torch says that there are ranks: from
    now on it says that there are none. To destroy the process group could wait for the others.
    """
    if process_count() > 1:
        _state().has_left = True
        dist.is_initialized = lambda: False


def rank() -> int:
    """Return this process's rank, 0 without DDP."""
    return dist.get_rank() if _is_initialized() else 0


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, without gradient.

    Args:
        x: ``(B, *)``; B may differ between the ranks, the other sizes may not.

    Returns:
        ``(sum of B, *)``, the same on every rank.
    """
    return gather_rows(x, row_counts(len(x)))


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Do what ``all_gather_rows`` does, where the ``counts`` of rows on all ranks are known."""
    if world_size() == 1:
        return x
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:n] for rows, n in zip(gathered, counts, strict=True)])


def row_counts(count: int) -> list[int]:
    """Return how many rows each rank has, in rank order; this one has ``count``."""
    return [number for (number,) in all_gather_numbers([count])]


def all_gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """Return the numbers of each rank, in rank order; all give equally many.

    They are exchanged on the CPU: no device is waited for.
    """
    if world_size() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(gathered, mine, group=numbers_group())
    return [each.tolist() for each in gathered]


def any_of_ranks(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether any rank has set it, exchanged on the CPU."""
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=numbers_group())
    return [bool(flag) for flag in found.tolist()]


def numbers_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Return the process group for numbers on the CPU; the first call, on all ranks, makes it.

    Args:
        timeout: How long its collectives may take; torch's default if not given.
    """
    state = _state()
    if state.numbers is None:
        is_for_cpu = dist.get_backend() == dist.Backend.GLOO
        state.numbers = (
            dist.group.WORLD if is_for_cpu else dist.new_group(backend="gloo", timeout=timeout)
        )
    return state.numbers


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


def least(number: int) -> int:
    """Return the smallest of the ranks' numbers."""
    return min(own for (own,) in all_gather_numbers([number]))


def broadcast(x: Tensor) -> Tensor:
    """Return rank 0's ``x`` on every rank."""
    if world_size() == 1:
        return x
    shared = x.detach().clone()
    dist.broadcast(shared, src=0)
    return shared


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
    if process_count() > 1:
        dist.barrier()
        dist.destroy_process_group()
        _state()  # nothing may keep it: gloo's threads would outlive the interpreter


class SynchronizedError(ValueError):
    """An error that all ranks raise at the same place."""


def ranks_save_together() -> bool:
    """Return whether all ranks are saving, rather than one alone after an error of its own.

    A rank that saves alone would wait for ever in a collective. One of a ``ResumableModule`` has
    left the others before it saves, so that its collectives are the identity.
    """
    if process_count() > 1 and _state().has_left:
        return False
    kind = sys.exc_info()[0]
    return world_size() == 1 or kind is None or issubclass(kind, (SystemExit, SynchronizedError))
