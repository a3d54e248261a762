"""When callbacks draw curves and show them in loggers: after validation runs, and at the end.

To draw one takes a few tenths of a second: where no logger can show it, it is drawn once, at the
end, for the run's folder.
"""

from pathlib import Path

from lightning.pytorch import Trainer

from lightning_vr.lifecycle.loggers import is_training, run_folder, shows_pictures


class CurveDisplay:
    """Decides whether curves are shown, at most once for each step.

    Attributes:
        folder: The run's folder, from ``open`` on.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self._shown_step = -1

    def open(self, trainer: Trainer) -> None:
        """Begin a fit; all ranks call it."""
        self.folder = run_folder(trainer)
        self._shown_step = -1

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether to show curves after a validation run: on rank 0, where a logger can."""
        is_due = trainer.is_global_zero and is_training(trainer) and shows_pictures(trainer)
        self._shown_step = trainer.global_step if is_due else self._shown_step
        return is_due

    def is_new(self, trainer: Trainer) -> bool:
        """Return whether curves have not been shown at this step."""
        return self._shown_step != trainer.global_step
