"""Signals to stop or to save, which all ranks obey at the end of the same batch.

Lightning's handlers broadcast and save wherever the signal finds their rank, even within another
collective or between an optimizer's step and its count, and each rank ends where it first sees
SIGTERM, so that others wait for it for ever. Here the handlers only record the signal, and the
ranks exchange their records after each training batch and each validation run.

Private attributes of Lightning's signal connector are as seen in version 2.6.
"""

import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed.distributed_c10d import _get_default_store

from lightning_vr.core.distributed import all_reduce_sum, rank, ranks_save_together, world_size
from lightning_vr.lifecycle.loggers import is_training

_SECONDS_TO_HEAR = 10
"""How long a rank that fails waits for the news that rank 0 has failed, too."""


class CoordinatedStop:
    """Records whether this rank was asked to stop or to save, and synchronizes the ranks."""

    def __init__(self) -> None:
        self._stop_asked = self._save_asked = False

    def install_signal_handlers(self, trainer: Trainer) -> None:
        """Replace Lightning's signal handlers; call it before Lightning registers them."""
        self._stop_asked = self._save_asked = False
        connector: Any = trainer._signal_connector

        def note_save(*_: Any) -> None:
            self._save_asked = True

        connector._slurm_sigusr_handler_fn = note_save  # SLURM sends it before its time limit
        if trainer.world_size == 1:
            return

        def note_stop(signum: Any, _: Any) -> None:
            launcher: Any = trainer.strategy.launcher
            if launcher is not None and not self._stop_asked:
                launcher.kill(signum)
            self._stop_asked = True

        connector._sigterm_notifier_fn = note_stop

    def synchronize(self, trainer: Trainer) -> None:
        """Let Lightning save or stop on all ranks if any rank was asked to; all of them call it."""
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


class _FailedBarrier:
    """A barrier of ranks that fail: they wait for the files of rank 0, if that fails, too.

    It uses the store, as other ranks may be in a collective that ends only when these ranks are
    gone.
    """

    def __init__(self) -> None:
        self._store = _get_default_store()
        self._met = 0
        self._tell()

    def __call__(self, *_: Any, **__: Any) -> None:
        self._met += 1
        self._tell()
        if rank() > 0:
            with suppress(RuntimeError):  # rank 0 has not failed, or is gone
                self._store.wait([self._key(0)], timedelta(seconds=_SECONDS_TO_HEAR))
                self._store.wait([self._key(self._met)])

    def _tell(self) -> None:
        if rank() == 0:
            self._store.set(self._key(self._met), "")

    def _key(self, number: int) -> str:
        return f"lightning_vr/failed/{number}"


def bypass_collectives(trainer: Trainer) -> None:
    """Let a rank that fails alone save and end without the other ranks."""
    strategy: Any = trainer.strategy
    is_error = isinstance(sys.exc_info()[1], Exception)
    if not is_error or ranks_save_together() or not is_training(trainer):
        return
    if not isinstance(strategy.barrier, _FailedBarrier):
        strategy.barrier = _FailedBarrier()
        strategy.broadcast = strategy.reduce = strategy.reduce_boolean_decision = _identity


def _identity(found: Any, *_: Any, **__: Any) -> Any:
    return found
