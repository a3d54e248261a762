"""Numbers, pictures and tables for every logger, and the run's folder for files.

A logger gets a few numbers of each event. Curves over noise levels are pictures and tables, as one
number for each level would be hundreds of columns.

No logger ends a training run: one that raises, or a disk that is full, is a warning.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

_LOGGER_METHODS = (
    "log_metrics",
    "log_hyperparams",
    "log_image",
    "log_table",
    "save",
    "after_save_checkpoint",
    "finalize",
)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run, which is created if it does not exist; all ranks call it."""
    logger = trainer.logger
    check_run_names(logger)
    if logger is None or isinstance(logger, (CSVLogger, TensorBoardLogger)):
        folder = Path(trainer.log_dir or trainer.default_root_dir)
    else:
        # all runs share its log_dir: this run's folder is where Lightning puts its checkpoints
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        own = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
        # only rank 0 has the experiment, which may give name and version
        folder = trainer.strategy.broadcast(own)
    with training_goes_on(trainer, f"The folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def leads_outside(*parts: str) -> bool:
    """Return whether names, one below the other, lead out of the folder that they are put into."""
    path = os.path.normpath(os.path.join(*parts))
    return os.path.isabs(path) or path.split(os.sep)[0] == os.pardir


def check_run_names(logger: Any) -> None:
    """Raise if the name or version of a logger of files leads out of its ``save_dir``.

    Raises:
        ValueError: With the name.
    """
    if not isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return
    parts = [str(part) for part in (logger.name, logger.version) if part is not None]
    if any(leads_outside(part) for part in [*parts, os.path.join("", *parts)]):
        raise ValueError(
            f"`name` and `version` of {type(logger).__name__} must stay within its `save_dir`, got "
            f"{os.path.join('', *parts)}: use names without '..', or set `save_dir`."
        )


def keeps_numbers(trainer: Trainer) -> bool:
    """Return whether a run writes files of numbers: who wants no logger wants none of them."""
    return bool(trainer.loggers) and not trainer.fast_dev_run  # type: ignore[attr-defined]


def is_training(trainer: Trainer) -> bool:
    """Return whether a trainer is within a fit, also during an error that ends it."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.state.stage is not None


@contextmanager
def training_goes_on(trainer: Trainer, what: str) -> Iterator[None]:
    """Turn an error into a warning while a trainer is fitting; no collective may be within.

    Args:
        trainer: The trainer.
        what: What could not be written, as the subject of a sentence.
    """
    try:
        yield
    except Exception as error:
        if not is_training(trainer):
            raise
        rank_zero_warn(
            f"{what} could not be written ({type(error).__name__}: {error}): training goes on."
        )


def warn_on_logger_errors(trainer: Trainer) -> None:
    """Make loggers warn instead of raising in training, once for each of their methods.

    Raises:
        ValueError: If the name of a run leads out of the folder of all runs.
    """
    for logger in trainer.loggers:
        check_run_names(logger)
        for name in _LOGGER_METHODS:
            method = getattr(logger, name, None)
            if method is not None:
                # an earlier trainer may have wrapped it
                setattr(logger, name, _warning_once(getattr(method, "wrapped", method), trainer))


def _warning_once(method: Callable[..., Any], trainer: Trainer) -> Callable[..., Any]:
    has_warned = False

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_warned
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if not is_training(trainer):
                raise
            if not has_warned:
                rank_zero_warn(
                    f"`{method.__qualname__}` failed ({type(error).__name__}: {error}): training "
                    f"goes on, and this logger may lack what it was given."
                )
            has_warned = True

    call.wrapped = method  # type: ignore[attr-defined]
    return call


def log_numbers(
    trainer: Trainer, numbers: Mapping[str, float], curves: Mapping[str, float] | None = None
) -> None:
    """Send numbers to every logger in one event, and to the metrics that callbacks monitor.

    Args:
        trainer: The trainer.
        numbers: A few numbers by name.
        curves: Points of curves by name, which no logger gets but callbacks can monitor.
    """
    if trainer.sanity_checking:
        return
    for logger in trainer.loggers if numbers else ():
        with training_goes_on(trainer, f"Numbers to {type(logger).__name__}"):
            logger.log_metrics(dict(numbers), step=trainer.global_step)
    monitored = trainer.callback_metrics  # each access waits for the device
    for name, value in (dict(curves or {}) | dict(numbers)).items():
        monitored[name] = torch.tensor(value)


def shows_pictures(trainer: Trainer) -> bool:
    """Return whether a logger can show pictures or tables; rank 0 alone calls it."""
    found = False
    for logger in trainer.loggers:
        with training_goes_on(trainer, f"Pictures to {type(logger).__name__}"):
            experiment: Any = getattr(logger, "experiment", None)
            methods = (
                (logger, ("log_image", "log_table")),
                (experiment, ("add_image", "add_text")),
            )
            found |= any(hasattr(of, name) for of, names in methods for name in names)
    return found


def log_picture(trainer: Trainer, name: str, path: Path) -> None:
    """Show the PNG at ``path`` in every logger that can show pictures; rank 0 alone calls it."""
    for logger in trainer.loggers:
        with training_goes_on(trainer, f"The picture of {name} to {type(logger).__name__}"):
            _show(logger, name, path, trainer.global_step)


def log_table(
    trainer: Trainer, name: str, columns: Sequence[str], rows: Iterable[Sequence[float | str]]
) -> None:
    """Show a table in every logger that can show tables or text; rank 0 alone calls it.

    Args:
        trainer: The trainer.
        name: Name of the picture that it belongs to; loggers get it as ``<name>_table``.
        columns: Names of the columns.
        rows: Values; numbers that are not finite are shown as empty cells.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    for logger in trainer.loggers:
        with training_goes_on(trainer, f"The table of {name} to {type(logger).__name__}"):
            _show_table(logger, f"{name}_table", list(columns), cells, trainer.global_step)


def _show_table(logger: Any, name: str, columns: list[str], cells: Any, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_table"):
        logger.log_table(key=name, columns=columns, data=cells, step=step)
    elif hasattr(experiment, "add_text"):
        experiment.add_text(name, markdown_table(columns, cells), step)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[float | str | None]]) -> str:
    """Return a table in Markdown, with numbers of four digits."""
    shown = [columns, ["---"] * len(columns), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in shown)


def _cell(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(cell: float | str | None) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _show(logger: Any, name: str, path: Path, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[str(path)], step=step)
    elif hasattr(experiment, "add_image"):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        experiment.add_image(name, pixels, step, dataformats="HWC")


def level_names(levels: Tensor) -> list[str]:
    """Return noise levels as decimals with the fewest digits that make them distinct.

    Some loggers reject a name with the plus sign of an exponent.
    """
    for digits in range(2, 18):
        names = [
            np.format_float_positional(level, digits, unique=False, fractional=False, trim="-")
            for level in levels.tolist()
        ]
        if len(set(names)) == len(names):
            break
    return names
