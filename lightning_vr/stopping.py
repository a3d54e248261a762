"""A signal to stop that all ranks take at the end of the same batch.

Lightning's handler broadcasts from wherever its rank happens to be, also from within another
collective, and each rank ends where it sees the signal first: others wait for it for ever. Here the
handler takes a note, and the ranks agree on it after each training batch and each validation run.
"""

import sys
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_vr.distributed import all_reduce_sum, ranks_save_together, world_size


class SharedStop:
    """Whether this rank was asked to stop, and what the ranks make of it."""

    def __init__(self) -> None:
        self._is_asked = False

    def take_over(self, trainer: Trainer) -> None:
        """Handle SIGTERM in Lightning's place; call it before that registers its handler."""
        self._is_asked = False
        if trainer.world_size == 1:
            return

        def note(signum: Any, _: Any) -> None:
            launcher: Any = trainer.strategy.launcher
            if launcher is not None and not self._is_asked:
                launcher.kill(signum)
            self._is_asked = True

        trainer._signal_connector._sigterm_notifier_fn = note  # type: ignore[method-assign]

    def agree(self, trainer: Trainer) -> None:
        """Let Lightning stop on all ranks if one was asked to; all of them call it."""
        if world_size() == 1:
            return
        asked = torch.tensor([float(self._is_asked)], device=trainer.strategy.root_device)
        if float(all_reduce_sum(asked)) > 0:
            trainer._signal_connector.received_sigterm = True


def save_alone(trainer: Trainer) -> None:
    """Let a rank that fails alone save and end: it would wait for others, which are elsewhere."""
    kind = sys.exc_info()[0]
    is_error = kind is not None and issubclass(kind, Exception)
    if not is_error or ranks_save_together() or trainer.state.stage is None:
        return
    strategy: Any = trainer.strategy
    strategy.barrier = _no_wait
    strategy.broadcast = strategy.reduce = strategy.reduce_boolean_decision = _own


def _no_wait(*_: Any, **__: Any) -> None:
    pass


def _own(found: Any, *_: Any, **__: Any) -> Any:
    return found
