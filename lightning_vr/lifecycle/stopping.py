"""Signals to stop or to save, which all ranks obey at the end of the same batch.

Lightning's handlers broadcast and save wherever the signal finds their rank, even within another
collective or between an optimizer's step and its count, and each rank ends where it first sees
SIGTERM, so that others wait for it for ever. Here the handlers only record the signal, and the
ranks exchange their records after each training batch and each validation run, on the CPU: no
device is waited for.

Where nothing is trained (``validate``, ``test``, ``predict``, and before the first step) there is
nothing to save together. A rank that was asked to stop tells the others by the store, and each ends
where it next looks.

Private attributes of Lightning's signal connector and training loop are as seen in version 2.6.
"""

import signal
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_vr.core.distributed import any_of_ranks, numbers_group
from lightning_vr.core.peers import announce_stop, is_stop_announced
from lightning_vr.lifecycle.lone_failure import end_alone_on_failure


class CoordinatedStop:
    """Records whether this rank was asked to stop or to save, and synchronizes the ranks."""

    def __init__(self) -> None:
        self._stop_asked = self._save_asked = self._all_stop = self._evaluates = False

    def begin_fit(self, trainer: Trainer) -> None:
        """Replace Lightning's signal handlers; call it before Lightning registers them."""
        self._stop_asked = self._save_asked = self._all_stop = self._evaluates = False
        connector: Any = trainer._signal_connector

        def note_save(*_: Any) -> None:
            self._save_asked = True

        connector._slurm_sigusr_handler_fn = note_save  # SLURM sends it before its time limit
        if trainer.world_size == 1:
            return
        connector._sigterm_notifier_fn = self._handler(trainer)
        # it broadcasts rank 0's record on the device before each batch, and waits for it
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _nothing
        numbers_group(getattr(trainer.strategy, "_timeout", None))
        self._prepare_end(trainer)

    def begin_evaluation(self, trainer: Trainer) -> None:
        """Replace Lightning's handler of SIGTERM, which it has registered, where it broadcasts."""
        self._stop_asked = self._all_stop = False
        self._evaluates = True
        if trainer.world_size > 1:
            trainer._signal_connector._register_signal(signal.SIGTERM, self._handler(trainer))
            self._prepare_end(trainer)

    def end_evaluation_if_asked(self, trainer: Trainer) -> None:
        """End this rank if it evaluates and any was asked to stop.

        Raises:
            SIGTERMException: If one was.
        """
        if self._evaluates and is_evaluating(trainer):
            raise_if_asked(trainer)

    def synchronize(self, trainer: Trainer) -> None:
        """Let Lightning save or stop on all ranks if any rank was asked to; all of them call it."""
        stop, save = any_of_ranks([self._stop_asked, self._save_asked])
        connector: Any = trainer._signal_connector
        if save:
            self._save_asked = False
            type(connector)._slurm_sigusr_handler_fn(connector, "to save and be queued again", None)
        if stop:
            self._all_stop = True
            connector.received_sigterm = True

    def is_synchronized(self) -> bool:
        """Return whether all ranks have been told to stop at the same place."""
        return self._all_stop

    def _prepare_end(self, trainer: Trainer) -> None:
        end_alone_on_failure(trainer, self.is_synchronized)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            # who has forked this process waits for its result, unless it ends with a status
            SIGTERMException.code = 128 + signal.SIGTERM

    def _handler(self, trainer: Trainer) -> Any:
        def note_stop(signum: Any, _: Any) -> None:
            launcher: Any = trainer.strategy.launcher
            if launcher is not None and not self._stop_asked:
                launcher.kill(signum)
            self._stop_asked = True
            announce_stop()
            if is_evaluating(trainer):
                trainer._signal_connector.received_sigterm = True

        return note_stop


def raise_if_asked(trainer: Trainer) -> None:
    """End this rank if any was asked to stop; call it where nothing is saved together.

    Raises:
        SIGTERMException: If one was.
    """
    if trainer.received_sigterm or is_stop_announced():
        raise SIGTERMException


def is_evaluating(trainer: Trainer) -> bool:
    """Return whether a trainer validates, tests or predicts, and that not within a fit."""
    is_running = trainer.state.stage is not None
    return is_running and trainer.state.fn not in (None, TrainerFn.FITTING)


def _nothing() -> None:
    pass
