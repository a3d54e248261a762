"""A signal to stop that all ranks take at the end of the same batch.

Lightning's handler broadcasts from wherever its rank happens to be, also from within another
collective, and each rank ends where it sees the signal first: others wait for it for ever. Here the
handler takes a note, and the ranks agree on it after each training batch and each validation run.
"""

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_vr.distributed import all_reduce_sum, world_size


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
