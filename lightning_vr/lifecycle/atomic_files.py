"""Files that are replaced as a whole, even if the process is killed or the disk is full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once it is written and on the disk.

    Args:
        path: What to replace, on a local file system.
        mode: How to open it.
        **options: As ``open`` takes them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name that a search for checkpoints does not find
    partial = path.with_name(f".{path.name.replace('ckpt', 'partial')}")
    try:
        with partial.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    """Write a folder's entries to the disk: without it a power failure may undo the renaming."""
    if os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # some network file systems cannot flush a folder, and need not
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
