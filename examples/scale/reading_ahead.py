"""Time training steps whose references are drawn from files, read as they are drawn and ahead.

    python examples/scale/reading_ahead.py          # 131,072 latents of 4 x 32 x 32: 2.1 GB
    python examples/scale/reading_ahead.py --quick

Steps do what those of a ``DiffusionModule`` do. Each run has a process of its own, and the same
references as the others. The files are in the system's cache, or are dropped from it in each step
before the next references are read.
"""

import argparse
import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bank_memory import SHAPE, write_cache
from diffusers import UNet2DModel
from scale_on_paper import aligned
from torch import Tensor, multiprocessing

from lightning_vr import STF, Diffusion
from lightning_vr.core.rng import generator
from lightning_vr.data import CachedLatents
from lightning_vr.posterior import References, StoredReferences
from lightning_vr.training.reference_bank import prefetch

BATCH, DRAWN, STEPS = 64, 1024, 12
PAGE, MADV_DONTNEED = os.sysconf("SC_PAGE_SIZE"), 4


def stored(folder: str) -> list[Tensor]:
    """Return the latents, mapped from their files."""
    found = CachedLatents(folder, posterior="mean")._part("train").stored_samples()
    assert found is not None
    return found[0]


def squared_norms(folder: str, answer: Callable[..., None]) -> None:
    """Send what a bank keeps in memory, from a process that reads all files."""
    bank = StoredReferences.prepare(stored(folder))
    answer((bank.squared_norms.numpy(), bank.centre.numpy()))


class TimedReferences(StoredReferences):
    """Notes how long the last reading of drawn ones kept a step waiting."""

    waited = 0.0

    def take(self, index: Tensor) -> References:
        start = time.perf_counter()
        found = super().take(index)
        TimedReferences.waited = time.perf_counter() - start
        return found


def drop_from_cache(folder: str, parts: list[Tensor]) -> None:
    """Let the system forget files: first the pages that are mapped here, then what it keeps."""
    for part in parts:
        offset = part.data_ptr() % PAGE
        mapped = ctypes.c_void_p(part.data_ptr() - offset), ctypes.c_size_t(part.nbytes + offset)
        if ctypes.CDLL(None).madvise(*mapped, MADV_DONTNEED) != 0:
            raise OSError("The system does not drop pages.")
    for path in Path(folder).rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(
    folder: str, kept: list, reads_ahead: bool, is_cold: bool, answer: Callable[..., None]
) -> None:
    """Send medians over steps: s in which a step waits for references, s of it, CPU s of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    channels = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    target = STF(DRAWN, storage="data")
    model = Diffusion(UNet2DModel(32, 4, 4, **blocks, **channels), target=target, sigma_data=1.0)
    optimizer = torch.optim.AdamW(model.parameters())
    parts, (norms, centre) = stored(folder), map(torch.from_numpy, kept)
    bank = TimedReferences(tuple(part.flatten(1) for part in parts), norms, centre)
    target.set_bank(bank, indexed=True)
    x0 = torch.randn(BATCH, *SHAPE, generator=generator("bank", 0))  # the first of the first file
    batch = {"x0": x0, "index": torch.arange(BATCH)}

    estimate, found = model.loss(batch, model.generator("train", 0)), []
    for step in range(1, STEPS + 1):
        if is_cold:
            drop_from_cache(folder, parts)
        start = time.perf_counter(), time.process_time()
        if reads_ahead:
            prefetch(model, target, estimate.noised, model.generator("train", step))
        optimizer.zero_grad()
        estimate.loss.backward()
        optimizer.step()
        estimate = model.loss(batch, model.generator("train", step))
        end = time.perf_counter(), time.process_time()
        found.append([TimedReferences.waited, end[0] - start[0], end[1] - start[1]])
    answer(torch.tensor(found).median(dim=0).values.tolist())


def alone(function: Callable[..., None], *arguments: object):
    """Return what a function sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=function, args=(*arguments, answers.put))
    process.start()
    found = answers.get()
    process.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer latents")
    count = 4096 if parser.parse_args().quick else 131_072
    rows = [["files", "references are read", "s of waiting", "s of a step", "CPU s of a step"]]
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), count, torch.float32)
        kept = alone(squared_norms, folder)
        for is_cold in (True, False):
            for reads_ahead in (False, True):
                found = alone(measure, folder, kept, reads_ahead, is_cold)
                where = "on disk" if is_cold else "in the system's cache"
                how = "in the step before" if reads_ahead else "as they are drawn"
                rows.append([where, how, *(f"{seconds:.3f}" for seconds in found)])
    print(f"{count:,} latents of {SHAPE}, B = {BATCH}, {DRAWN} drawn\n\n{aligned(rows)}")


if __name__ == "__main__":
    main()
