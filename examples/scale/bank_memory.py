"""Measure the memory of a bank of latents in float32, in bfloat16 and mapped from files.

    python examples/scale/bank_memory.py            # 16,384 latents of 4 x 32 x 32
    python examples/scale/bank_memory.py --quick

Each kind has a process of its own, which reads a cache that was written first. Next to what it
takes stands what the formulas say, and what these say of the 1,281,167 latents of ImageNet.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scale_on_paper import aligned
from torch import Tensor, multiprocessing

from lightning_vr import STF, Clean, Noised
from lightning_vr.core.rng import generator
from lightning_vr.data import CachedLatents
from lightning_vr.data.latent_files import (
    INDEX,
    SPLITS,
    Identity,
    Index,
    Shard,
    Sums,
    expected_header,
    shard_bytes,
    shard_name,
)
from lightning_vr.posterior import StoredReferences

SHAPE, BATCH, SHARD, STEPS = (4, 32, 32), 64, 1024, 3
IMAGENET = 1_281_167
KINDS = {"float32": 4, "bfloat16": 2, "mapped": 0}
"""Bytes in memory for each number of a bank."""


def write_cache(folder: Path, count: int, dtype: torch.dtype) -> None:
    """Write a cache of random latents, the same for training and validation."""
    identity = Identity("", "", "", SHARD, str(dtype).removeprefix("torch."))
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    sums = None
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        for number, first in enumerate(range(0, count if split == "train" else SHARD, SHARD)):
            mean = torch.randn(SHARD, *SHAPE, generator=generator("bank", number)).to(dtype)
            columns = {"mean": mean, "std": torch.zeros(SHARD, 1, dtype=dtype)}
            name = shard_name(split, number)
            data = shard_bytes(columns, expected_header(identity, first, SHARD))
            (folder / name).write_bytes(data)
            shards[split].append(Shard(name, first, SHARD, len(data)))
            sums = sums or Sums.of(columns["mean"], columns["std"])
    assert sums is not None
    (folder / INDEX).write_text(
        Index(identity, None, shards, dict.fromkeys(SPLITS, sums)).to_json()
    )


def resident(kind: str) -> float:
    """Return memory of this process in MB: ``RssAnon`` of its own, ``RssFile`` of mapped files."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(kind))
    return int(line.split()[1]) * 1024 / 1e6


def fill(target: STF, parts: list[Tensor]) -> None:
    """Fill a target's bank shard by shard, as a run does, or map it."""
    if target.storage == "data":
        target.set_bank(StoredReferences.prepare(parts), indexed=True)
        return
    dtype = torch.bfloat16 if target.dtype == "bfloat16" else torch.float32
    x0 = torch.empty(sum(map(len, parts)), *SHAPE, dtype=dtype)
    torch.cat(parts, out=x0) if parts[0].dtype == dtype else copy_parts(parts, x0)
    target.fill(x0, None, indexed=True)


def copy_parts(parts: list[Tensor], into: Tensor) -> None:
    """Convert parts one by one."""
    for i, part in enumerate(parts):
        into[i * SHARD : i * SHARD + len(part)] = part


def measure(kind: str, folder: str, answer: Callable[..., None]) -> None:
    """Send MB of its own, of files, and the seconds of a target, from a process of its own."""
    torch.set_num_threads(1)
    parts, _ = CachedLatents(folder, posterior="mean")._part("train").stored_samples() or ([], None)
    options = {"storage": "data"} if kind == "mapped" else {"dtype": kind}
    target = STF("all", **options)
    own = torch.stack([parts[0][i].float() for i in range(BATCH)])
    one, index = torch.ones(BATCH), torch.arange(BATCH)
    sigma, noise = torch.logspace(-1, 1, BATCH), torch.randn(own.shape)
    xt = own + sigma[:, None, None, None] * noise
    noised = Noised(xt, own, noise, sigma, one, sigma, one, index=index)
    STF("batch")(noised, Clean(own, index=index), generator("bank"))  # libraries take some
    before = resident("RssAnon")
    fill(target, parts)
    taken = []
    for _ in range(STEPS):
        start = time.process_time()
        target(noised, Clean(own, index=index), generator("bank"))
        taken.append(time.process_time() - start)
    answer((resident("RssAnon") - before, resident("RssFile"), min(taken)))


def on_paper(count: int, number_bytes: int) -> float:
    """Return MB: numbers in memory, squared norms, and two chunks of a mapped or narrow bank."""
    dim = SHAPE[0] * SHAPE[1] * SHAPE[2]
    chunks = 0 if number_bytes == 4 else 2 * 4 * (3 << 21)
    return (count * (number_bytes * dim + 4) + chunks) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer latents")
    count = 2048 if parser.parse_args().quick else 16384
    rows = [["", "MB measured", "MB on paper", "MB of files", "CPU s of a target", "ImageNet GB"]]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), count, torch.bfloat16)
        for kind, number_bytes in KINDS.items():
            answers = context.SimpleQueue()
            process = context.Process(target=measure, args=(kind, folder, answers.put))
            process.start()
            own, files, seconds = answers.get()
            process.join()
            paper = [on_paper(n, number_bytes) for n in (count, IMAGENET)]
            cells = [f"{own:,.0f}", f"{paper[0]:,.0f}", f"{files:,.0f}", f"{seconds:.2f}"]
            rows.append([kind, *cells, f"{paper[1] / 1e3:.3g}"])
    print(f"{count:,} latents of {SHAPE}, B = {BATCH}\n\n{aligned(rows)}")


if __name__ == "__main__":
    main()
