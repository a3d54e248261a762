"""Counter-based randomness: every draw comes from a generator keyed by what it is for.

Lightning seeds all ranks alike and does not restore random states on resume. A generator that is a
pure function of (seed, purpose, rank, global step, micro-step) makes ranks differ by construction,
lets a resumed run repeat what the uninterrupted one draws, and keeps a measurement from
disturbing training (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator that is a pure function of ``key``.

    Args:
        *key: Seed, purpose, rank, step, and whatever else distinguishes this draw.
        device: Where the draws are made; each kind of device has its own stream.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def set_global_rng(source: torch.Generator) -> None:
    """Let torch's global generators start from a keyed one's seed.

    For code that draws from these and takes no generator: dropout, an encoder that samples.
    """
    # `torch.manual_seed` takes a hundred times as long, and queues a call for each idle device
    for stream in _global_streams(source):
        stream.manual_seed(source.initial_seed())


@contextmanager
def seed_global_rng(source: torch.Generator) -> Iterator[None]:
    """Do what ``set_global_rng`` does for a while; restore the global generators on leaving."""
    streams = _global_streams(source)
    states = [stream.get_state() for stream in streams]
    try:
        set_global_rng(source)
        yield
    finally:
        for stream, state in zip(streams, states, strict=True):
            stream.set_state(state)


@contextmanager
def preserve_global_rng() -> Iterator[None]:
    """Restore the global random states of torch, numpy and Python at the end or at an error."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _global_streams(source: torch.Generator) -> list[torch.Generator]:
    streams = [torch.default_generator]
    if source.device.type == "cuda":
        streams.append(torch.cuda.default_generators[source.device.index or 0])
    return streams
