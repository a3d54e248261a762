"""Seconds that a call takes, on a device too that works on while the host goes on."""

import time
from collections.abc import Callable
from typing import TypeVar

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
