"""Signals to stop or to save that all ranks take at the end of the same batch.

Lightning's handlers broadcast and save from wherever their rank happens to be, also from within
another collective or between an optimizer's step and its count, and each rank ends where it sees
SIGTERM first: others wait for it for ever. Here the handlers take a note, and the ranks agree on it
after each training batch and each validation run.
"""

import sys
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_vr.distributed import all_reduce_sum, ranks_save_together, world_size


class SharedStop:
    """Whether this rank was asked to stop or to save, and what the ranks make of it."""

    def __init__(self) -> None:
        self._stop_asked = self._save_asked = False

    def take_over(self, trainer: Trainer) -> None:
        """Handle signals in Lightning's place; call it before that registers its handlers."""
        self._stop_asked = self._save_asked = False
        connector: Any = trainer._signal_connector

        def note_save(*_: Any) -> None:
            self._save_asked = True

        connector._slurm_sigusr_handler_fn = note_save  # SLURM's, ahead of its time limit
        if trainer.world_size == 1:
            return

        def note_stop(signum: Any, _: Any) -> None:
            launcher: Any = trainer.strategy.launcher
            if launcher is not None and not self._stop_asked:
                launcher.kill(signum)
            self._stop_asked = True

        connector._sigterm_notifier_fn = note_stop

    def agree(self, trainer: Trainer) -> None:
        """Let Lightning save or stop on all ranks if one was asked to; all of them call it."""
        stop, save = self._stop_asked, self._save_asked
        if world_size() > 1:
            asked = torch.tensor([float(stop), float(save)], device=trainer.strategy.root_device)
            stop, save = (all_reduce_sum(asked) > 0).tolist()
        connector: Any = trainer._signal_connector
        if save:
            self._save_asked = False
            type(connector)._slurm_sigusr_handler_fn(connector, "to save and be queued again", None)
        if stop:
            connector.received_sigterm = True


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
