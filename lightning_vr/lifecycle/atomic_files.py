"""Files that are whole or as they were, wherever the process is killed or the disk is full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once all is written, and durably so.

    Args:
        path: What to replace, on a local file system.
        mode: How to open it.
        **options: As ``open`` takes them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name that nobody who looks for checkpoints takes for one
    partial = path.with_name(f".{path.name.replace('ckpt', 'partial')}")
    try:
        with partial.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
