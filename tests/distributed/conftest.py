"""Two processes on this machine that talk by gloo."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing


def _run(rank, folder, function):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Run ``function(rank)`` on two ranks; return what each of them returns."""

    def run(function):
        folder = tmp_path_factory.mktemp("ranks")
        multiprocessing.start_processes(_run, (folder, function), nprocs=2, start_method="fork")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return run
