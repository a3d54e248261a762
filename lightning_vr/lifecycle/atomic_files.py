"""Files and folders that are replaced as a whole, even if the process is killed or the disk full.

What is written goes to a hidden file in the same folder, is flushed to the disk and then renamed,
which is atomic on one file system. A process that is killed leaves the hidden file behind. While it
is written it is locked, and the lock goes with its process: whoever writes to the folder next, or
starts a run there, removes hidden files that nobody has locked.

A folder goes the same way, but that no folder can be renamed to one that is there: the old one is
hidden first, and a process that is killed at that moment leaves it so, for ``recovered`` to find.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks: there what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

# short, as a name that is nearly too long may take no ending; and found by no search for "ckpt"
_PREFIX, _SUFFIX, _OLD = ".lightning_vr-", ".partial", ".old"

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


def hidden_folder(path: Path) -> Path:
    """Return where a folder is written before it takes the place of ``path``."""
    return _beside(path, _SUFFIX)


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make and lock the hidden folder of ``path``, and remove it if it does not replace it."""
    hidden = hidden_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)  # a file system without locks keeps it
    hidden.mkdir()
    lock = _lock(hidden)
    try:
        yield
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def replace_by_hidden_folder(path: Path) -> None:
    """Put the hidden folder of ``path`` in its place: there is always the old or the new one."""
    old = _beside(path, _OLD)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    else:
        path.unlink(missing_ok=True)
    hidden_folder(path).rename(path)
    flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_at_once(path: Path) -> None:
    """Remove a file, link or folder, of which a process that is killed leaves no part in place."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = hidden_folder(path)
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def replace_link(link: Path, target: Path) -> bool:
    """Let a link lead to another file or folder; return whether the file system could do so."""
    hidden = link.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    try:
        hidden.symlink_to(os.path.relpath(target, link.parent))
        hidden.replace(link)
    except OSError:  # no links, or a folder is there
        with suppress(OSError):
            hidden.unlink()
        return False
    return True


def recovered(path: Path) -> Path:
    """Put a folder back that a killed process was about to replace, and return where it is."""
    old = _beside(path, _OLD)
    if not old.is_dir() or path.exists():
        return path
    # a process that is alive has the hidden folder, and is about to go on
    if not hidden_folder(path).exists() or _remove_abandoned(hidden_folder(path)):
        with suppress(OSError):  # another process was faster, or nothing may be written here
            old.rename(path)
    return path if path.exists() else old


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left in a folder: what was not whole, or is replaced."""
    # a folder may be gone, or not ours
    with suppress(OSError):
        for partial in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            _remove_abandoned(partial)
        replaced = {_beside(path, _OLD) for path in folder.iterdir()}
        for old in replaced.intersection(folder.glob(f"{_PREFIX}*{_OLD}")):
            shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(partial: Path) -> bool:
    """Remove what no process is writing any more; return whether it is gone."""
    if partial.is_symlink():
        partial.unlink(missing_ok=True)
        return True
    lock = _lock(partial)
    if lock is None:
        return False
    try:
        with suppress(OSError):
            # it may have been renamed meanwhile, and be another one's
            if os.path.samestat(os.fstat(lock), partial.stat()):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    finally:
        os.close(lock)
    return not partial.exists()


def _lock(path: Path) -> int | None:
    """Lock a file or folder until the descriptor is closed; None if it is locked, or cannot be."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some network file systems have no locks
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _beside(path: Path, suffix: str) -> Path:
    # what restarts from the newest name with "ckpt" in it must not find this one
    return path.with_name(f"{_PREFIX}{hashlib.sha256(path.name.encode()).hexdigest()[:16]}{suffix}")


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
