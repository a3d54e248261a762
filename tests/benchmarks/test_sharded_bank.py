"""A bank shared out over two ranks against sending each rank the half that it lacks, per call.

Both give the posterior of each rank's own queries over all references, from ranks that hold half
of them each. Run with ``pytest tests/benchmarks --benchmark-only -s -n 0``; figures are printed.
"""

import statistics
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from lightning_vr.core.distributed import all_gather_rows
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.posterior.sharded_references import ShardedReferences

RANKS, QUERIES, COUNT, DIM, ROUNDS = 2, 64, 8192, 3072, 5
NUMBER = 4  # bytes


def counting(patch):
    """Let collectives note the bytes that this rank must send: what it gives, to all others."""
    sent = []
    for name in ("all_gather", "all_to_all_single"):
        whole = getattr(dist, name)

        def counted(out, given, *rest, whole=whole, name=name):
            own = given.numel() * given.element_size()
            # the one sends the whole to each of the others, the other a part of it
            share = 1 / RANKS if name == "all_to_all_single" else 1
            sent.append(round(own * share * (RANKS - 1)))
            return whole(out, given, *rest)

        patch.setattr(dist, name, counted)
    return sent


def timed(call):
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def compared(rank, folder):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=300)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timeout
    )
    source = torch.Generator().manual_seed(0)
    references = torch.randn(COUNT, DIM, generator=source)
    own = references[rank::RANKS].clone()
    sigma = torch.logspace(-1, 2, QUERIES)
    noise = torch.randn(RANKS, QUERIES, DIM, generator=source)[rank]
    xt = references[rank * QUERIES : (rank + 1) * QUERIES] + sigma[:, None] * noise
    prepared = ShardedReferences.prepare(own)
    del references

    def sharded():
        return posterior_mean(xt, 1.0, sigma, prepared).mean

    def gathered():
        held = prepared.local
        rows, norms = all_gather_rows(held.rows), all_gather_rows(held.squared_norms)
        return posterior_mean(xt, 1.0, sigma, References(rows, norms, held.centre)).mean

    calls = {"sharded": sharded, "gathered": gathered}
    found = {"difference": float((sharded() - gathered()).abs().max())}
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timed(call))
    for name, call in calls.items():
        with pytest.MonkeyPatch.context() as patch:
            sent = counting(patch)
            call()
        found[name] = {"seconds": times[name], "bytes": sum(sent)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_shared_bank_against_gathering_the_references_in_every_call(benchmark, tmp_path):
    def both():
        multiprocessing.start_processes(compared, (tmp_path,), nprocs=RANKS, start_method="fork")

    benchmark.pedantic(both, rounds=1, iterations=1)
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    assert found["difference"] < 1e-3

    ours, other = (found[name] for name in ("sharded", "gathered"))
    seconds = [statistics.median(each["seconds"]) for each in (ours, other)]
    others = RANKS - 1
    # queries with two numbers and a position each, sums with five; three numbers beforehand
    query, sums = NUMBER * (DIM + 2) + 8, NUMBER * (DIM + 5)
    formula = others * (QUERIES * (query + sums) + 3 * 8)
    gathering = others * (COUNT // RANKS * NUMBER * (DIM + 1) + 2 * 8)
    assert [ours["bytes"], other["bytes"]] == [formula, gathering]

    ratios = {"time": seconds[1] / seconds[0], "bytes": other["bytes"] / ours["bytes"]}
    benchmark.extra_info |= {"seconds": seconds, "ratios": ratios}
    print(f"\nsharded {1e3 * seconds[0]:.0f} ms, {ours['bytes'] / 2**20:.2f} MB sent per rank")
    print(f"gathered {1e3 * seconds[1]:.0f} ms, {other['bytes'] / 2**20:.2f} MB sent per rank")
    print(f"{ratios['time']:.1f} times as fast, {ratios['bytes']:.1f} times fewer bytes")
