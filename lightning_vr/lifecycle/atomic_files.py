"""Files that are replaced as a whole, even if the process is killed or the disk is full.

What is written goes to a hidden file in the same folder, is flushed to the disk and then renamed,
which is atomic on one file system. A process that is killed leaves the hidden file behind. While it
is written it is locked, and the lock goes with its process: whoever writes to the folder next, or
starts a run there, removes hidden files that nobody has locked.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks: there what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

# short, as a name that is nearly too long may take no ending; and found by no search for "ckpt"
_PREFIX, _SUFFIX = ".lightning_vr-", ".partial"

_cleaned: set[Path] = set()
"""Folders in which this process has looked for what others have left."""


@contextmanager
def replacing(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once it is written and on the disk.

    Args:
        path: What to replace, on a local file system; its folder is made.
        mode: How to open it.
        **options: As ``open`` takes them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _cleaned:
        _cleaned.add(path.parent)
        remove_abandoned(path.parent)
    partial, file = _open_locked(path.parent, mode, options)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            # elsewhere it is still locked, so that nobody takes it for abandoned
            partial.replace(path)
        flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left in a folder of files that were not yet whole."""
    if fcntl is None:
        return
    # a folder may be gone, or not ours
    with suppress(OSError):
        for partial in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            with suppress(OSError), partial.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()


def _open_locked(folder: Path, mode: str, options: dict[str, Any]) -> tuple[Path, IO[Any]]:
    while True:
        partial = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        file = partial.open(mode, **options)
        if fcntl is None:
            return partial, file
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # between opening and locking it may have been taken for abandoned
        if os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()


def flush_folder(folder: Path) -> None:
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
