"""posterior_mean at B=64, n=4096, d=3072 in float32: speed and memory.

Run with ``pytest tests/benchmarks --benchmark-only -s -n 0``; figures are printed, not asserted.
"""

import math
import multiprocessing
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_vr.posterior import low_noise
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


def ratio_of_cpu_seconds(ours, other, rounds):
    """The least of some rounds of each, as other processes only add to it, each after the other."""
    taken = {ours: [], other: []}
    for k in range(2 * rounds):
        for call in (ours, other)[:: (-1) ** k]:
            start = time.process_time()
            call()
            taken[call].append(time.process_time() - start)
    return min(taken[ours]) / min(taken[other])


@pytest.mark.parametrize("own", [False, True], ids=["alone", "own"])
@pytest.mark.parametrize("kind", ["training", "low", "near"])
@pytest.mark.parametrize(("dim", "rounds"), [(64, 200), (192, 80), (784, 20), (3072, 6)])
@pytest.mark.parametrize("queries", [64, 1024])
def test_cpu_seconds_of_telling_near_duplicates_apart(
    benchmark, monkeypatch, queries, dim, rounds, kind, own
):
    """Against the same without: n = 1,437, at EDM's noise levels, at 0.01, and with neighbours."""
    source = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(1437, dim, generator=source)
    sigma = torch.full((queries,), 0.01)
    if kind == "training":
        sigma = torch.exp(1.2 * torch.randn(queries, generator=source) - 1.2)
    if kind == "near":
        apart = torch.randn(700, dim, generator=source)
        x[700:1400] = x[:700] + 0.02 * torch.nn.functional.normalize(apart, dim=1)
    rows = torch.arange(queries) % 700
    xt = x[rows] + sigma[:, None] * torch.randn(queries, dim, generator=source)
    prepared = References.prepare(x)
    given = {"own": x[rows], "exclude": rows} if own else {}

    def call(tolerance):
        monkeypatch.setattr(low_noise, "_TOLERANCE", tolerance)
        posterior_mean(xt, 1.0, sigma, prepared, **given)

    ours, without = partial(call, low_noise._TOLERANCE), partial(call, math.inf)
    ratio = ratio_of_cpu_seconds(ours, without, max(3, 64 * rounds // queries))
    benchmark.extra_info["ratio"] = ratio
    benchmark.pedantic(ours, rounds=1)
    print(f"\nB={queries} d={dim} {kind}, own={own}: {ratio:.3f} times the CPU seconds of without")


@pytest.mark.parametrize("near", [False, True], ids=["apart", "near-duplicates"])
@pytest.mark.parametrize(
    ("count", "rounds"), [(COUNT, 40), pytest.param(50_000, 5, marks=pytest.mark.slow)]
)
def test_cpu_seconds_against_its_own_two_bare_matrix_products(benchmark, count, rounds, near):
    """As STF asks, with own samples.

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

    ratio = ratio_of_cpu_seconds(ours, two_products, rounds)
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
