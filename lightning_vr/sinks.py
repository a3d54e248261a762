"""Where numbers and pictures go: every logger, and always a file in the run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run, made if need be. All ranks must call it."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def log_numbers(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Send ``numbers`` to every logger in one event, and to what callbacks can monitor."""
    if trainer.sanity_checking:
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=trainer.global_step)
    for name, value in numbers.items():
        trainer.callback_metrics[name] = torch.tensor(value)


def log_picture(trainer: Trainer, name: str, path: Path) -> None:
    """Show the PNG at ``path`` in every logger that can show pictures. Rank 0 alone calls it."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(path)], step=trainer.global_step)
        elif hasattr(experiment, "add_image"):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def level_names(levels: Tensor) -> list[str]:
    """Return noise levels in decimals, with as few digits as tell them apart.

    Some loggers refuse the plus sign of an exponent in a name.
    """
    for digits in range(2, 18):
        names = [
            np.format_float_positional(level, digits, unique=False, fractional=False, trim="-")
            for level in levels.tolist()
        ]
        if len(set(names)) == len(names):
            break
    return names
