"""The settings of a run in its own folder, without replacing a file of another run."""

import os
from itertools import count
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_vr.lifecycle.loggers import run_folder


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` to the run's own folder, or ``config_1.yaml`` where there is one.

    Lightning's callback writes to ``trainer.log_dir``. Without a logger that is the working
    directory, where the user's own config.yaml may lie; with most loggers all runs share it.
    Arguments are those of ``SaveConfigCallback``: with ``overwrite`` the file is replaced.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        if self.save_to_log_dir:
            # not in save_config, which only rank zero calls: rank zero tells all ranks the folder
            folder = run_folder(trainer)
            if trainer.is_global_zero:
                self._write(folder)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True

    def _write(self, folder: Path) -> None:
        name = Path(self.config_filename)
        names = (f"{name.stem}_{number}{name.suffix}" if number else name for number in count())
        paths = (folder / each for each in names)
        # writing to a broken link would create its target, so its name counts as used
        path = next(path for path in paths if self.overwrite or not os.path.lexists(path))
        self.parser.save(
            self.config,
            path,
            skip_unset=False,
            skip_validation=True,
            overwrite=self.overwrite,
            multifile=self.multifile,
        )
