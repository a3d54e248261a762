"""A progress bar that counts steps, for runs whose number of epochs is not limited.

With ``max_steps`` and no ``max_epochs`` Lightning's bar begins anew with each epoch and is headed
``Epoch 0/-2``. This one shows ``step 9/750`` and the time that the whole run has left.

``_get_train_description`` is a private method of ``RichProgressBar``, as seen in version 2.6.
"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's default progress bar with optimizer steps in place of batches of an epoch."""

    @property
    def total_train_batches(self) -> int | float:
        """Number of steps of the run, which may be infinite."""
        steps = self.trainer.max_steps
        return steps if steps >= 0 else float("inf")

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Put the count beside what it counts."""
        description, bar, count, *rest = super().configure_columns(trainer)
        return [description, count, bar, *rest]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the run's first epoch, and go on through the others."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, completed=trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the number of steps so far."""
        step = trainer.global_step - 1  # a batch counts once it has ended
        super().on_train_batch_end(trainer, pl_module, outputs, batch, step)

    def _get_train_description(self, current_epoch: int) -> str:
        return "step"


def count_steps(trainer: Trainer, configured: list[Any]) -> None:
    """Let a trainer's default progress bar count steps, if its epochs are not limited.

    Args:
        trainer: The trainer.
        configured: The callbacks that it was given: a progress bar among them stays.
    """
    if trainer.max_epochs != -1 or any(isinstance(each, ProgressBar) for each in configured):
        return
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for i, callback in enumerate(callbacks):
        if type(callback) is RichProgressBar:
            callbacks[i] = StepProgressBar()
