"""Seconds that a call takes, on a device too that works on while the host goes on."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

_Found = TypeVar("_Found")


def timed(function: Callable[[], _Found], device: torch.device) -> tuple[_Found, float]:
    """Return what a function returns, and its seconds."""
    _synchronize(device)
    start = time.perf_counter()
    found = function()
    _synchronize(device)
    return found, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled networks as they were written.

    Of functorch's transforms and of forward mode the compiler gives up on a network, and from then
    on it leaves that network's code alone wherever it is called, training included.
    """
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
