"""The callbacks of a trainer: an attribute that Lightning sets where types do not see it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, in the list that it keeps itself."""
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


@contextmanager
def using_callbacks(trainer: Trainer, callbacks: Sequence[Callback]) -> Iterator[None]:
    """Let a trainer have other callbacks for a while."""
    before = callbacks_of(trainer)
    trainer.callbacks = [*callbacks]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks = before  # type: ignore[attr-defined]
