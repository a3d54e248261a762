"""posterior_mean at B=64, n=4096, d=3072 in float32: speed and memory.

Run with ``pytest tests/benchmarks --benchmark-only -s -n 0``; figures are printed, not asserted.
"""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.posterior.references import References

QUERIES, COUNT, DIM = 64, 4096, 3072


def problem(count=COUNT):
    """Queries at noise levels from where one reference counts to where all do."""
    source = torch.Generator().manual_seed(0)
    references = torch.randn(count, DIM, generator=source)
    sigma = torch.logspace(-2, 3, QUERIES)
    noise = torch.randn(QUERIES, DIM, generator=source)
    return references[:QUERIES] + sigma[:, None] * noise, sigma, references


def materialised(xt, sigma, references):
    """The textbook formulation, with tensors of (B, n, d)."""
    distances = (xt[:, None] - references).square().sum(2)
    weights = (-distances / (2 * sigma[:, None] ** 2)).softmax(1)
    return (weights[:, :, None] * references).sum(1)


def test_speed_against_the_formulation_that_materialises_b_n_d(compare, benchmark):
    xt, sigma, references = problem()
    ours, other = compare(
        lambda: posterior_mean(xt, 1.0, sigma, references),
        lambda: materialised(xt, sigma, references),
        rounds=5,
        label="posterior_mean on a plain tensor and the materialised formulation",
    )
    prepared = References.prepare(references)
    benchmark.extra_info["speed_up"] = other / ours
    print(f"{other / ours:.0f} times as fast")
    torch.testing.assert_close(
        posterior_mean(xt, 1.0, sigma, prepared).mean,
        materialised(xt, sigma, references),
        rtol=0,
        atol=1e-3,
    )


def test_speed_of_prepared_references_against_the_formulation_that_materialises_b_n_d(
    compare, benchmark
):
    xt, sigma, references = problem()
    prepared = References.prepare(references)
    ours, other = compare(
        lambda: posterior_mean(xt, 1.0, sigma, prepared),
        lambda: materialised(xt, sigma, references),
        rounds=5,
        label="posterior_mean on prepared references and the materialised formulation",
    )
    benchmark.extra_info["speed_up"] = other / ours
    print(f"{other / ours:.0f} times as fast")


@pytest.mark.parametrize("near", [False, True], ids=["apart", "near-duplicates"])
@pytest.mark.parametrize(
    ("count", "rounds"), [(COUNT, 40), pytest.param(50_000, 5, marks=pytest.mark.slow)]
)
def test_cpu_seconds_against_its_own_two_bare_matrix_products(benchmark, count, rounds, near):
    """The least of some rounds, as other processes only add to it; as STF asks, with own samples.

    With near-duplicates all queries have one, two sigmas away at noise 0.01.
    """
    xt, sigma, references = problem(count)
    if near:
        noise, sigma = (xt - references[:QUERIES]) / sigma[:, None], torch.full((QUERIES,), 0.01)
        apart = torch.nn.functional.normalize(torch.randn(QUERIES, DIM), dim=1)
        references[-QUERIES:] = references[:QUERIES] + 0.02 * apart
        xt = references[:QUERIES] + sigma[:, None] * noise
    prepared = References.prepare(references)
    weights = torch.randn(QUERIES, count).softmax(1)
    own, exclude = references[:QUERIES].clone(), torch.arange(QUERIES)

    def ours():
        posterior_mean(xt, 1.0, sigma, prepared, own=own, exclude=exclude)

    def two_products():
        return xt @ prepared.rows.T, weights @ prepared.rows

    taken = {ours: [], two_products: []}
    for _ in range(rounds):
        for call, seconds in taken.items():
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
    ratio = min(taken[ours]) / min(taken[two_products])
    benchmark.extra_info["ratio"] = ratio
    benchmark.pedantic(ours, rounds=1)
    print(f"\nn={count}: {ratio:.3f} times the CPU seconds of two bare products")


def resident(name):
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def peak_extra_memory(count, prepare):
    """Peak resident memory of one call beyond what was held before, in MB; in a fresh process."""
    xt, sigma, references = problem(count)
    given = References.prepare(references) if prepare else references
    posterior_mean(xt[:2], 1.0, 1.0, references[:4])  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    posterior_mean(xt, 1.0, sigma, given)
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("prepare", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("count", [COUNT, 50_000])
def test_extra_memory_is_bounded_by_the_chunk(benchmark, count, prepare):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = benchmark.pedantic(
            pool.apply, (peak_extra_memory, (count, prepare)), rounds=1, iterations=1
        )
    whole = QUERIES * count * DIM * 4 / 2**20
    benchmark.extra_info["peak_extra_mb"] = peak
    print(f"\nn={count}: {peak:.1f} MB extra; one tensor of (B, n, d) is {whole:.0f} MB")
