"""A progress bar that counts steps, for runs whose number of epochs is not limited.

With ``max_steps`` and no ``max_epochs`` Lightning's bar begins anew with each epoch and is headed
``Epoch 0/-2``. This one shows ``step 9/750`` and the time that the whole run has left.

``_get_train_description`` is a private method of ``RichProgressBar``, as seen in version 2.6.
"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_vr.lifecycle.trainer_callbacks import callbacks_of


class StepProgressBar(RichProgressBar):
    """Lightning's default progress bar; where epochs are not limited it shows optimizer steps."""

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches of an epoch, or of steps of the run; either may be infinite."""
        if not self._counts_steps:
            return super().total_train_batches
        steps = self.trainer.max_steps
        return steps if steps >= 0 else float("inf")

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Put the number of steps beside the word."""
        columns: list[Any] = super().configure_columns(trainer)
        if self._counts_steps:
            columns[1], columns[2] = columns[2], columns[1]
        return columns

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first epoch of a run, and with each epoch if epochs are limited."""
        is_first = self.train_progress_bar_id is None
        if is_first or not self._counts_steps:
            super().on_train_epoch_start(trainer, pl_module)
        if self._counts_steps and self.progress and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, completed=trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the number of batches of the epoch, or of steps of the run."""
        done = trainer.global_step if self._counts_steps else batch_idx + 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done - 1)

    @property
    def _counts_steps(self) -> bool:
        return self.trainer.max_epochs == -1

    def _get_train_description(self, current_epoch: int) -> str:
        return "step" if self._counts_steps else super()._get_train_description(current_epoch)


def use_step_progress_bar(trainer: Trainer) -> None:
    """Put a ``StepProgressBar`` in the place of Lightning's default progress bar."""
    callbacks = callbacks_of(trainer)
    for i, callback in enumerate(callbacks):
        if type(callback) is RichProgressBar:
            callbacks[i] = StepProgressBar()
