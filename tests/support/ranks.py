"""Processes on this machine that talk by gloo."""

import os
import socket
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


def launch(function, world_size):
    """Run ``function(rank)`` in processes as a launcher starts them, whose trainers meet.

    What makes several runs there saves the start of as many processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, function)
    multiprocessing.start_processes(_launched, arguments, nprocs=world_size, start_method="fork")


def _launched(rank, port, function):
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0}
    os.environ |= {name: str(value) for name, value in place.items()}
    function(rank)


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
