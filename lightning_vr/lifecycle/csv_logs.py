"""A CSV log that loses no row if the process is killed, resumed or the disk is full.

Lightning's writer empties the file and writes all rows anew whenever there is a new column: a kill
or a full disk at that moment loses them. Here a file with more columns is written beside the old
one and renamed, and rows that could not be written are written with the next ones.

It also deletes the file of a folder that it is opened in again. Here a run that goes on from a
checkpoint in the same folder keeps the rows: all of them in a test, and in a fit those that the
checkpoint counts. Later ones were written before a kill, and the resumed run writes them again.
What another command has added to the same file since is dropped with them.
"""

import csv
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.lifecycle.atomic_files import replacing


class _WholeWriter(ExperimentWriter):
    """Lightning's writer with a ``save`` that appends rows or replaces the whole file.

    Attributes:
        has_old_rows: Whether its file may have rows that are not of the run.
    """

    has_old_rows = False

    def save(self) -> None:
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        columns = sorted({*self.metrics_keys, *(name for row in self.metrics for name in row)})
        if columns == self.metrics_keys and path.exists():
            _append(path, columns, self.metrics)
        else:
            _write(path, columns, [*_read(path), *self.metrics])
        self.metrics_keys, self.metrics = columns, []


def keep_csv_logs_whole(trainer: Trainer) -> None:
    """Make the local CSV logs of a trainer lose no row; call it once they are open."""
    for logger in trainer.loggers:
        writer = logger.experiment if type(logger) is CSVLogger else None
        if type(writer) is ExperimentWriter and "://" not in writer.metrics_file_path:
            writer.__class__ = _WholeWriter


def reopen_csv_logs(trainer: Trainer) -> None:
    """Open the CSV logs of a trainer with the rows that their files have.

    It must come before Lightning opens them, and so before it is known whether a fit goes on from a
    checkpoint: ``begin_csv_logs`` drops what is not of the run.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        # seen in Lightning 2.6: None until it is open
        if type(logger) is not CSVLogger or logger._experiment is not None:
            continue
        path = Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        aside = path.with_suffix(".kept.csv")  # may be left by a process that was killed just here
        if path.is_file():
            os.replace(path, aside)
        if not aside.is_file():
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Previous log files in this directory")
            writer: Any = logger.experiment
        os.replace(aside, path)
        writer.__class__ = _WholeWriter
        writer.metrics_keys, writer.has_old_rows = _columns(path), True


def begin_csv_logs(trainer: Trainer, counts: Mapping[str, int]) -> None:
    """Drop rows that are not of a fit: those after its checkpoint, and all if it has none.

    Args:
        trainer: A trainer whose checkpoint is loaded.
        counts: What ``count_csv_rows`` returned for the checkpoint.
    """
    for writer in _writers(trainer):
        path = Path(writer.metrics_file_path)
        if not writer.has_old_rows:
            continue
        writer.has_old_rows = False
        rows, count = _read(path), counts.get(writer.metrics_file_path)
        if trainer.ckpt_path is None:
            rank_zero_warn(
                f"Experiment logs directory {path.parent} exists, and {path.name} in it is of an "
                f"earlier run: its rows are dropped. Use another `version` to keep them."
            )
            path.unlink()
            writer.metrics_keys = []
        elif count is not None and count < len(rows):
            _write(path, writer.metrics_keys, rows[:count])


def count_csv_rows(trainer: Trainer) -> dict[str, int]:
    """Return how many rows each CSV log has, by its file."""
    return {writer.metrics_file_path: _count_rows(writer) for writer in _writers(trainer)}


def _writers(trainer: Trainer) -> Iterator[_WholeWriter]:
    for logger in trainer.loggers:
        writer = logger._experiment if type(logger) is CSVLogger else None
        if isinstance(writer, _WholeWriter):
            yield writer


def _count_rows(writer: _WholeWriter) -> int:
    path = Path(writer.metrics_file_path)
    lines = path.read_bytes().count(b"\n") if path.exists() else 1
    return lines - 1 + len(writer.metrics)


def _columns(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _read(path: Path) -> Sequence[Mapping[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _append(path: Path, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    size = path.stat().st_size
    try:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerows(rows)
    except BaseException:
        os.truncate(path, size)  # some rows may be written; all will be with the next ones
        raise
