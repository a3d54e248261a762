"""The Fréchet distance over two ranks is that of one process on all samples."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from lightning_vr.metrics import FrechetMetric, IdentityFeatures

REAL, GENERATED = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0)).unbind()


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = FrechetMetric(IdentityFeatures(3))
    metric.update(REAL[:41] if rank == 0 else REAL[41:], real=True)
    try:
        metric.compute()
    except ValueError as error:
        refusal = str(error)

    if rank == 0:
        metric.update(GENERATED[:10] * 2, real=False)
    partly = metric.compute()
    local = [int(metric.real_features_num_samples), int(metric.fake_features_num_samples)]
    metric.update(GENERATED[10 + 25 * rank : 35 + 25 * rank] * 2, real=False)

    found = {"refusal": refusal, "partly": partly, "local": local, "whole": metric.compute()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(_rank, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


@pytest.mark.parametrize(("step", "count"), [("partly", 10), ("whole", 60)])
def test_two_ranks_give_the_distance_of_one_process(ranks, step, count):
    metric = FrechetMetric(IdentityFeatures(3))
    metric.update(REAL, real=True)
    metric.update(GENERATED[:count] * 2, real=False)

    for found in ranks:
        torch.testing.assert_close(found[step], metric.compute(), rtol=1e-12, atol=0)


def test_ranks_keep_their_own_sums_after_the_collective_compute(ranks):
    assert [found["local"] for found in ranks] == [[41, 10], [19, 0]]


def test_all_ranks_refuse_together_and_can_go_on(ranks):
    assert all(re.search("generated side .* got 0:", found["refusal"]) for found in ranks)
