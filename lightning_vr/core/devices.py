"""Devices: where a module is, its dtypes, numbers that are awaited, seconds, compiled networks."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Found = TypeVar("_Found")


class PendingNumber:
    """A number on its way from its device to the host, which goes on meanwhile.

    Args:
        x: One number, on any device.
    """

    def __init__(self, x: Tensor) -> None:
        self._host, self._event = x, None
        if x.device.type == "cuda":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(x.device))

    def value(self) -> float:
        """Wait until the number has arrived and return it; later work is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.item()


def host_waits(device: torch.device) -> bool:
    """Return whether the host must wait for a device to read a number from it."""
    return device.type != "cpu"


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
    """Run compiled networks uncompiled.

    The compiler gives up on a network within functorch's transforms and forward mode. From then on
    that network runs uncompiled wherever it is called, in training too.
    """
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def without_compiler(network: nn.Module) -> nn.Module:
    """Return the network that ``torch.compile`` has wrapped, or ``network`` itself."""
    inner = network._modules.get("_orig_mod")  # to look for what is not there takes longer
    return network if inner is None else inner


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer, the CPU if it has none."""
    return next((x.device for x in _tensors(module)), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating-point tensor; torch's default if none."""
    for x in _tensors(module):
        if x.is_floating_point():
            return x.dtype
    return torch.get_default_dtype()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from _parameters(module)
    yield from module.buffers()


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yield what ``parameters`` does, the first of them, which each call asks for, at once."""
    for x in module._parameters.values():
        if x is not None:
            yield x
    for part in module._modules.values():
        if part is not None:
            yield from _parameters(part)
