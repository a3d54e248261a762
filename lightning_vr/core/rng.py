"""Counter-based randomness: every draw comes from a generator keyed by what it is for.

Lightning seeds all ranks alike and does not restore random states on resume. A generator that is a
pure function of (seed, purpose, rank, global step, micro-step) makes ranks differ by construction,
lets a resumed run repeat what the uninterrupted one draws, and keeps a measurement from
disturbing training (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

import hashlib
import random
from collections.abc import Callable, Iterator
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


def set_global_rng(source: torch.Generator) -> Callable[[], None]:
    """Let torch's global generators start from a keyed one's seed, for dropout and the like.

    Returns:
        A function that restores the global generators.
    """
    # `torch.manual_seed` takes a hundred times as long, and queues a call for each idle device
    streams = [torch.default_generator]
    if source.device.type == "cuda":
        streams.append(torch.cuda.default_generators[source.device.index or 0])
    states = [stream.get_state() for stream in streams]
    for stream in streams:
        stream.manual_seed(source.initial_seed())

    def restore() -> None:
        for stream, state in zip(streams, states, strict=True):
            stream.set_state(state)

    return restore


@contextmanager
def seed_global_rng(source: torch.Generator) -> Iterator[None]:
    """Seed torch's global generators as ``set_global_rng`` does; restore them on leaving."""
    restore = set_global_rng(source)
    try:
        yield
    finally:
        restore()


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
