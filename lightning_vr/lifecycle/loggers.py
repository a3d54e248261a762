"""Numbers, pictures and tables for every logger, and the run's folder for files.

A logger gets a few numbers of each event. Curves over noise levels are pictures and tables, as one
number for each level would be hundreds of columns. All stand at the step that Lightning gives its
own numbers, so that a loss and a picture of the same weights have the same x.

======================  ================================  ==========================================
logger                  picture ``<name>/picture``        table ``<name>/table``
======================  ================================  ==========================================
``WandbLogger``         image                             table, in the same call as the picture
``TensorBoardLogger``   image                             Markdown among the texts
``MLFlowLogger``        image with a step                 CSV among the artifacts
others                  a PNG in the run's folder         a CSV in the run's folder, for most names
======================  ================================  ==========================================

No logger ends a training run: one that raises, or a disk that is full, is a warning.
"""

import csv
import functools
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
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

Table = tuple[Sequence[str], Iterable[Sequence[float | str]]]
"""Names of columns, and rows; what is no finite number or is empty is shown as an empty cell."""

_Cells = list[list[float | str | None]]


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


def logged_step(trainer: Trainer) -> int:
    """Return the step that loggers get: that of Lightning's own numbers at the same moment.

    It counts batches after which optimizers stepped. ``global_step`` is ahead of it by one from the
    end of a batch on, and counts a batch with two optimizers twice.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # as seen in Lightning 2.6


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
            logger.log_metrics(dict(numbers), step=logged_step(trainer))
    monitored = trainer.callback_metrics  # each access waits for the device
    for name, value in (dict(curves or {}) | dict(numbers)).items():
        monitored[name] = torch.tensor(value)


def shows_pictures(trainer: Trainer) -> bool:
    """Return whether a logger can show pictures."""
    return any(isinstance(logger, tuple(_SHOWN_BY)) for logger in trainer.loggers)


def log_picture(trainer: Trainer, name: str, path: Path, table: Table | None = None) -> None:
    """Show a PNG, and its numbers if given, where loggers can; rank 0 alone calls it.

    Args:
        trainer: The trainer.
        name: What is shown; loggers get ``<name>/picture`` and ``<name>/table``.
        path: The PNG.
        table: The numbers in the picture.
    """
    _show(trainer, name, path, table)


def log_table(
    trainer: Trainer, name: str, columns: Sequence[str], rows: Iterable[Sequence[float | str]]
) -> None:
    """Show a table as ``<name>/table`` where loggers can; rank 0 alone calls it."""
    _show(trainer, name, None, (columns, rows))


def _show(trainer: Trainer, name: str, path: Path | None, table: Table | None) -> None:
    columns, rows = table or ((), ())
    cells = [[_cell(value) for value in row] for row in rows]
    for logger in trainer.loggers:
        with training_goes_on(trainer, f"Picture or table of {name} to {type(logger).__name__}"):
            show = next((f for kind, f in _SHOWN_BY.items() if isinstance(logger, kind)), None)
            if show is not None:
                show(logger, name, path, list(columns), cells, logged_step(trainer))
            elif not isinstance(logger, (CSVLogger, DummyLogger)):
                _tell_files_only(type(logger).__name__)


@functools.cache
def _tell_files_only(logger: str) -> None:
    """Say once what a logger lacks."""
    rank_zero_info(f"{logger} shows no pictures and tables: they are files in the run's folder.")


def _show_in_wandb(
    logger: Any, name: str, path: Path | None, columns: list[str], cells: _Cells, step: int
) -> None:
    import wandb

    found: dict[str, Any] = {}
    if path is not None:
        found[f"{name}/picture"] = wandb.Image(str(path))
    if columns:
        found[f"{name}/table"] = wandb.Table(columns=[*columns], data=cells)
    logger.log_metrics(found, step)  # one call is one row of the history


def _show_in_tensorboard(
    logger: Any, name: str, path: Path | None, columns: list[str], cells: _Cells, step: int
) -> None:
    if path is not None:
        pixels = np.asarray(_opened(path))
        logger.experiment.add_image(f"{name}/picture", pixels, step, dataformats="HWC")
    if columns:
        logger.experiment.add_text(f"{name}/table", markdown_table(columns, cells), step)


def _show_in_mlflow(
    logger: Any, name: str, path: Path | None, columns: list[str], cells: _Cells, step: int
) -> None:
    client, run = logger.experiment, logger.run_id
    if path is not None:
        client.log_image(run, _opened(path), key=f"{name}/picture", step=step)
    if columns:  # a file for each step, as a table that grows is read and written anew each time
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([columns, *cells])
        client.log_text(run, lines.getvalue(), f"{name}/table/step_{step:08d}.csv")


_SHOWN_BY: dict[type, Callable[..., None]] = {
    WandbLogger: _show_in_wandb,
    TensorBoardLogger: _show_in_tensorboard,
    MLFlowLogger: _show_in_mlflow,
}
"""What shows pictures and tables in a logger, by its class."""


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[float | str | None]]) -> str:
    """Return a table in Markdown, with numbers of four digits."""
    shown = [columns, ["---"] * len(columns), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in shown)


def _cell(value: float | str) -> float | str | None:
    # an empty text among numbers would be refused, as a column has one type
    is_empty = value == "" or (isinstance(value, float) and not math.isfinite(value))
    return None if is_empty else value


def _text(cell: float | str | None) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


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
