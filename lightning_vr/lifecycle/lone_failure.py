"""A rank that fails alone: it saves if it can, and ends without the others.

An error, an interrupt from the keyboard or ``sys.exit`` may end one rank while the others wait for
it in a collective. It must take part in no collective itself, or all of them would wait for ever;
the others find out as soon as its process ends. Rank 0 saves what it has, the others save nothing.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import _get_default_store

from lightning_vr.core.distributed import SynchronizedError, leave_ranks, rank, world_size
from lightning_vr.core.peers import announce_end, lost_rank
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of

log = logging.getLogger(__name__)

_SECONDS_TO_HEAR = 5
"""How long a rank that fails waits for the news that rank 0 has failed, too."""

_SECONDS_TO_SAVE = 600
"""How long it then waits for a file of rank 0."""


def end_alone_on_failure(trainer: Trainer, is_stop_synchronized: Callable[[], bool]) -> None:
    """Let this rank leave the others if it fails alone, before any callback saves a checkpoint.

    Args:
        trainer: The trainer; the hook of its first callback is wrapped.
        is_stop_synchronized: Returns whether all ranks stop at the same place, if asked to.
    """
    callbacks: list[Any] = callbacks_of(trainer)
    if not callbacks:
        callbacks.append(Callback())
    first = callbacks[0]
    whole = getattr(first.on_exception, "whole", first.on_exception)
    first.on_exception = _LeavingFirst(whole, is_stop_synchronized)


class _LeavingFirst:
    """A hook ``on_exception`` that lets this rank leave the others first, if it fails alone."""

    def __init__(
        self, whole: Callable[..., None], is_stop_synchronized: Callable[[], bool]
    ) -> None:
        self.whole = whole
        self.is_stop_synchronized = is_stop_synchronized

    def __call__(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
        is_stop = isinstance(error, SIGTERMException)
        is_shared = isinstance(error, SynchronizedError)
        if world_size() > 1 and not is_shared and not (is_stop and self.is_stop_synchronized()):
            other = lost_rank(error)
            _say_why(error, other)
            announce_end(other)
            _leave(trainer)
        self.whole(trainer, module, error)


def _say_why(error: BaseException, other: str | None) -> None:
    if other is not None and hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"{other} ended; see its message")
    if not isinstance(error, Exception | SIGTERMException):
        # nothing else would say why this rank has ended
        log.error("rank %d ended by %r", rank(), error)


def _leave(trainer: Trainer) -> None:
    leave_ranks()
    strategy: Any = trainer.strategy
    strategy.barrier = _FailedBarrier()
    strategy.broadcast = strategy.reduce = strategy.reduce_boolean_decision = _identity


class _FailedBarrier:
    """A barrier of ranks that fail: they wait for the files of rank 0, if that fails, too.

    It uses the store, as other ranks may be in a collective that ends only when these ranks are
    gone.
    """

    def __init__(self) -> None:
        self._store = _get_default_store()
        self._met = 0
        self._has_rank_zero_failed: bool | None = None
        self._tell()

    def __call__(self, *_: Any, **__: Any) -> None:
        self._met += 1
        self._tell()
        if rank() == 0:
            return
        if self._has_rank_zero_failed is None:
            self._has_rank_zero_failed = self._is_told(0, _SECONDS_TO_HEAR)
        if self._has_rank_zero_failed:
            self._is_told(self._met, _SECONDS_TO_SAVE)

    def _tell(self) -> None:
        if rank() == 0:
            self._store.set(self._key(self._met), "")

    def _is_told(self, number: int, seconds: float) -> bool:
        """Return whether rank 0 meets this barrier for the n-th time within some seconds."""
        end = time.monotonic() + seconds
        with suppress(RuntimeError):  # rank 0 is gone
            while not self._store.check([self._key(number)]):
                if time.monotonic() > end:
                    return False
                time.sleep(0.05)
            return True
        return False

    def _key(self, number: int) -> str:
        return f"lightning_vr/failed/{number}"


def _identity(found: Any, *_: Any, **__: Any) -> Any:
    return found
