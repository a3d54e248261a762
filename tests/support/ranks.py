"""Processes on this machine that talk by gloo."""

from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing


def _run(rank, world_size, folder, function):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    torch.save(function(rank), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Run ``function(rank)`` on some ranks; return what each of them returns."""

    def run(function, world_size):
        folder = tmp_path_factory.mktemp("ranks")
        arguments = (world_size, folder, function)
        multiprocessing.start_processes(_run, arguments, nprocs=world_size, start_method="fork")
        files = [folder / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(file, weights_only=True) for file in files]

    return run


@pytest.fixture(scope="module")
def on_two_ranks(on_ranks):
    """Run ``function(rank)`` on two ranks; return what each of them returns."""
    return partial(on_ranks, world_size=2)
