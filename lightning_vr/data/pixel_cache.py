"""Decoded images in memory that all processes of a loader share.

To decode an image takes milliseconds, to copy one from memory microseconds. Rows are filled when
they are first decoded, by whichever process does so. A row's mark is written after its pixels:
processes that decode the same image write the same, and one that is killed leaves a row unmarked.

The memory is anonymous and grows as it is filled. It is no file in ``/dev/shm``, which is small in
many containers, and where an overfull one kills the processes that write.
"""

import mmap
import os
import weakref
from multiprocessing import context
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_vr.data.pixels import Pixels

_TYPES = {1: np.uint8, 2: np.uint16}


class PixelCache:
    """Pixels of the first images of a data set, in memory shared with worker processes.

    Copies and pickles are empty and stay so, unless they are made to start a process.

    Args:
        count: Number of images.
        shape: Shape of the pixels of one.
        is_deep: Whether some have 16 bits; without, those of 16 bits are not kept.
        max_bytes: Most memory to take.

    Attributes:
        capacity: Number of images that fit.
        bytes: Memory that they take.
    """

    def __init__(
        self, count: int, shape: tuple[int, ...], *, is_deep: bool, max_bytes: int
    ) -> None:
        self.count = count
        self.shape = shape
        self._row_bytes = int(np.prod(shape)) * (2 if is_deep else 1)
        self.capacity = min(count, max_bytes // (self._row_bytes + 1))
        self._file: int | None = None
        if self.capacity and hasattr(os, "memfd_create"):
            self._file = os.memfd_create("pixels")
            os.ftruncate(self._file, self.bytes)
        self._map()

    @property
    def bytes(self) -> int:
        """Memory of a full cache: the pixels, and a byte for each image."""
        return self.capacity * (self._row_bytes + 1)

    def get(self, index: int) -> Pixels | None:
        """Return a copy of the pixels of an image, or None if they are not here.

        Args:
            index: Its position in the data set.
        """
        item_bytes = int(self._marks[index]) if index < self.capacity else 0
        if item_bytes == 0:
            return None
        kind = _TYPES[item_bytes]
        used = int(np.prod(self.shape)) * item_bytes
        return self._rows[index, :used].view(kind).reshape(self.shape).copy()

    def put(self, index: int, pixels: Pixels) -> None:
        """Keep the pixels of an image if there is room for them.

        Args:
            index: Its position in the data set.
            pixels: Its pixels.
        """
        if index < self.capacity and pixels.nbytes <= self._row_bytes:
            self._rows[index, : pixels.nbytes] = pixels.reshape(-1).view(np.uint8)
            self._marks[index] = pixels.itemsize

    def whole(self) -> Tensor | None:
        """Return all pixels ``(count, *shape)`` where they are, if all are here and of 8 bits."""
        if self.capacity < self.count or not bool((self._marks == 1).all()):
            return None
        pixels = torch.from_numpy(self._rows)[:, : int(np.prod(self.shape))]
        return pixels.view(-1, *self.shape)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: self.__dict__[name] for name in ("count", "shape", "_row_bytes", "capacity")}
        is_for_process = context.get_spawning_popen() is not None
        if is_for_process and self._file is not None:
            return state | {"file": DupFd(self._file)}
        return state | {"capacity": 0, "file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = state.pop("file")
        self.__dict__.update(state)
        self._file = None if file is None else file.detach()
        self._map()

    def _map(self) -> None:
        if self._file is not None:
            memory: Any = mmap.mmap(self._file, self.bytes)
            weakref.finalize(self, os.close, self._file)
        else:  # forked processes share it all the same
            memory = mmap.mmap(-1, self.bytes) if self.capacity else b""
        flat = np.frombuffer(memory, dtype=np.uint8)
        self._marks = flat[: self.capacity]
        self._rows = flat[self.capacity :].reshape(self.capacity, self._row_bytes)
