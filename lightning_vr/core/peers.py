"""What ranks tell one another apart from collectives: that one has ended, or was asked to stop.

A collective fails where another rank has gone, and its message names neither the rank nor the
reason. The store that the ranks met by can be read at any time by any of them, without the others.
"""

from collections.abc import Iterator
from contextlib import suppress

from torch.distributed.distributed_c10d import _get_default_store

from lightning_vr.core.distributed import process_count, rank

_ENDED = "lightning_vr/ended"
_STOP = "lightning_vr/stop"

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "recv, got 0 bytes",
    "remote process exited",
    "Application timeout caused pair closure",
)
"""What gloo, NCCL and the store say where another process has gone."""


def announce_end(cause: str | None = None) -> None:
    """Let the other ranks know that this one ends without them; the first call counts.

    Args:
        cause: Which rank has ended before and so ends this one, if any has.
    """
    if process_count() > 1:
        with suppress(RuntimeError):  # the store has gone with its rank
            _get_default_store().compare_set(f"{_ENDED}/{rank()}", "", cause or f"rank {rank()}")


def announce_stop() -> None:
    """Let all ranks know that this one was asked to stop."""
    if process_count() > 1:
        with suppress(RuntimeError):
            _get_default_store().set(_STOP, "")


def is_stop_announced() -> bool:
    """Return whether any rank was asked to stop and said so."""
    with suppress(RuntimeError):
        return process_count() > 1 and bool(_get_default_store().check([_STOP]))
    return False


def lost_rank(error: BaseException) -> str | None:
    """Return which rank has ended, if an error is but the consequence of it, or None.

    Returns:
        The subject of a sentence, such as "rank 1".
    """
    if process_count() == 1 or not any(_is_loss(each) for each in _chain(error)):
        return None
    others = [number for number in range(process_count()) if number != rank()]
    if len(others) == 1:
        return f"rank {others[0]}"
    store = _get_default_store()
    try:
        keys = [f"{_ENDED}/{number}" for number in others]
        ended = [store.get(key).decode() for key in keys if store.check([key])]
    except RuntimeError:
        return "rank 0"  # which has the store
    return ended[0] if ended else "another rank"


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__
