"""Measure what a rank's references take on this machine's GPU, next to ``scale_on_paper.py``.

    python examples/scale/scale_on_gpu.py

One GPU stands for one of eight: it answers as many queries from as many references, of random
numbers. Communication between the eight is left out on both sides.
"""

import statistics
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

from lightning_vr import References, posterior_mean
from lightning_vr.core.devices import timed
from lightning_vr.core.rng import generator

GPUS, ROUNDS = 8, 5
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


def main():
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
