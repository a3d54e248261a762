"""Measure what a rank's references take on this machine's GPU, next to ``scale_on_paper.py``.

    python examples/scale/scale_on_gpu.py               # both tables
    python examples/scale/scale_on_gpu.py --device cpu  # the second one, smaller

One GPU stands for one of eight: it answers as many queries from as many references, of random
numbers. Communication between the eight is left out on both sides.

The second table is of ratios in one run: the posterior mean against two products in float32, the
formulation with tensors of (B, n, d), and chunks of 2^20 logits as they were before; then with
products in tensor cores, as ``torch.set_float32_matmul_precision("high")`` allows them: the same
posterior mean, and its two products, over those in float32. It counts the times that the host waits
for the GPU.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from scale_on_paper import (
    MODES,
    WORKLOADS,
    Machine,
    Mode,
    Workload,
    aligned,
    fill_peak,
    seconds,
    short,
    step_traffic,
    visited,
)
from torch import Tensor

from lightning_vr import References, posterior_mean
from lightning_vr.core.devices import timed
from lightning_vr.core.rng import generator
from lightning_vr.posterior.tensor_cores import Product, exact_products

GPUS, ROUNDS = 8, 5
SIZES = [(4096, 3072, 128), (50_000, 3072, 128), (50_000, 3072, 512)]
"""References, their numbers, and queries of the second table."""

_MATERIALISED = 1 << 31
"""Numbers of the largest tensor of the formulation that materialises: 8 GB."""

BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes/s by NVIDIA's data sheets; both reach 67 TFLOP/s in float32."""


def milliseconds(work: Workload, mode: Mode, device: torch.device) -> float:
    """Return the milliseconds of a rank's posterior means: the median of some rounds."""
    source = generator("scale on gpu", device=device)
    count, references = (round(x) for x in visited(work, mode, GPUS))
    rows = torch.randn(references, work.dim, generator=source, device=device)
    labels = torch.arange(references, device=device) % work.classes
    prepared = References.centred(rows, torch.zeros(work.dim, device=device), labels)
    own = torch.arange(count, device=device) % references
    sigma = torch.logspace(-0.5, 1, count, device=device)
    noise = torch.randn(count, work.dim, generator=source, device=device)
    xt = torch.addcmul(rows[own], sigma[:, None], noise)
    del noise
    call = partial(
        posterior_mean,
        xt,
        1.0,
        sigma,
        prepared,
        own=rows[own],
        exclude=own,
        query_group=labels[own],
    )
    taken = [timed(call, device)[1] for _ in range(ROUNDS + 1)]
    return 1e3 * statistics.median(taken[1:])  # the first one warms up


def materialised(xt: Tensor, sigma: Tensor, references: Tensor, rows: int) -> Tensor:
    """Return posterior means by the textbook formulation, so many queries at a time."""
    means = []
    for x, s in zip(xt.split(rows), sigma.split(rows), strict=True):
        distances = (x[:, None] - references).square().sum(2)
        weights = (-distances / (2 * s[:, None] ** 2)).softmax(1)
        means.append((weights[:, :, None] * references).sum(1))
    return torch.cat(means)


def waits_of_the_host(call: Callable[[], object]) -> int:
    """Return how often a call on CUDA waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in found)


def ratios(count: int, dim: int, batch: int, device: torch.device) -> list[str]:
    """Return a row of the second table: sizes, milliseconds, and ratios of other ways to it."""
    source = generator("posterior on gpu", device=device)
    x = torch.randn(count, dim, generator=source, device=device)
    own = torch.arange(batch, device=device)
    sigma = torch.logspace(-2, 2, batch, device=device)
    xt = torch.addcmul(
        x[own], sigma[:, None], torch.randn(batch, dim, generator=source, device=device)
    )
    prepared, weights = References.prepare(x), torch.rand(batch, count, device=device).softmax(1)
    call = partial(posterior_mean, xt, 1.0, sigma, prepared, own=x[own], exclude=own)

    def two_products(product: Product = torch.matmul) -> tuple[Tensor, Tensor]:
        return product(xt, prepared.rows.T), product(weights, prepared.rows)

    def in_tensor_cores() -> object:
        with tf32_is_allowed():
            return call()

    with tf32_is_allowed(), exact_products(xt) as product:
        pass
    few = max(1, _MATERIALISED // (count * dim))
    ways: list[Callable[[], object]] = [call, two_products]
    ways += [partial(materialised, xt, sigma, x, few)]
    ways += [partial(call, chunk_size=max(1, (1 << 20) // batch))]
    ways += [in_tensor_cores, partial(two_products, product)]
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS + 1):
        for found, way in zip(taken, ways, strict=True):
            found.append(timed(way, device)[1])
    ours, plain, dense, chunks, allowed, cores = (statistics.median(each[1:]) for each in taken)
    waits = str(waits_of_the_host(call)) if device.type == "cuda" else "-"
    exact = xt.double() @ prepared.rows.double().T
    errors = [float((two_products(way)[0] - exact).abs().max()) for way in (product, torch.matmul)]
    cells = [f"{batch}", f"{count:,}", f"{dim:,}", short(1e3 * ours)]
    times = (ours / plain, ours / dense, ours / chunks, allowed / ours, cores / plain)
    cells += [f"{time:.3g}" for time in times]
    return [*cells, f"{errors[0] / errors[1]:.3g}", waits]


@contextmanager
def tf32_is_allowed() -> Iterator[None]:
    """Set torch as users do who allow TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


HEAD = ["B", "n", "d", "ms", "over two products", "over (B, n, d)", "over chunks of 2^20"]
HEAD += ["with tensor cores over it", "their products over float32's", "their error over float32's"]
HEAD += ["waits of the host"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the second table")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda":
        on_paper_and_measured()
    sizes = SIZES if device.type == "cuda" else [(512, 768, 32)]
    print(f"\n{aligned([HEAD, *(ratios(*each, device) for each in sizes)])}")


def on_paper_and_measured() -> None:
    """Print the first table."""
    if not torch.cuda.is_available():
        raise SystemExit("This machine has no CUDA device: run it where there is one.")
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    bandwidth = next((value for chip, value in BANDWIDTHS.items() if chip in name), None)
    if bandwidth is None:
        raise SystemExit(f"There is no data sheet for {name}: add its bandwidth to BANDWIDTHS.")
    on = Machine(GPUS, hbm=bandwidth)
    rows = [["", "", "queries", "references", "ms on paper", "ms measured"]]
    for work in WORKLOADS:
        for mode in MODES:
            if mode.references not in ("batch", "all") or fill_peak(work, mode, GPUS) > on.memory:
                continue  # drawn references are few, and larger banks do not fit
            paper = seconds(work, mode, on) - step_traffic(work, mode, GPUS).seconds(on)
            sizes = [f"{round(x):,}" for x in visited(work, mode, GPUS)]
            found = milliseconds(work, mode, device)
            rows.append([work.name, str(mode), *sizes, short(1e3 * paper), short(found)])
            torch.cuda.empty_cache()
    print(f"{name}, as one of {GPUS}\n\n{aligned(rows)}")


if __name__ == "__main__":
    main()
