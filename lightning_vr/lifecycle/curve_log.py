"""Curves that change in training, in CSV files of their own: rows with a step, as they come.

A table of metrics has a column for each number: curves over twenty noise levels would fill it with
hundreds of them. A file of curves has a row for each step and noise level instead. ``step`` is the
number of optimizer steps so far, one more than what loggers get at the end of the same batch.

On a resume in the same folder, rows that the checkpoint does not count are dropped: a process wrote
them before it was killed, and the resumed run writes them again.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import keeps_numbers, run_folder, training_goes_on

Row = Sequence[float | int | str]


class CurveLog:
    """A CSV file of rows that begin with a step.

    Args:
        path: The file, or None to write none.
        columns: Names of the columns after ``step``.
        logged_step: Step of the last rows that belong to this run; later ones, and with -1 all, are
            dropped before anything is written.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], logged_step: int) -> None:
        self.path = path
        self.columns = ["step", *columns]
        self._logged_step = logged_step
        self._is_trimmed = path is None
        self._pending: list[Row] = []

    def trim(self) -> None:
        """Drop the rows of the file that are not of this run."""
        if self._is_trimmed or self.path is None:
            return
        kept = self._kept_rows()
        if kept:
            self._replace(kept)
        else:
            self.path.unlink(missing_ok=True)
        self._is_trimmed = True

    def add(self, step: int, rows: Iterable[Row]) -> None:
        """Write rows of a step; if the disk is full, the next call writes them too.

        Raises:
            OSError: If they could not be written.
        """
        if self.path is None:
            return
        self._pending += [(step, *row) for row in rows]
        if not self._pending:
            return
        self.trim()
        if self.path.exists():
            self._append()
        else:
            self._replace(self._pending)
        self._pending = []

    def _kept_rows(self) -> list[Row]:
        if self._logged_step < 0 or self.path is None or not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if header != self.columns:
            return []
        # the last row may be cut off
        whole = (row for row in rows if len(row) == len(header))
        return [row for row in whole if int(row[0]) <= self._logged_step]

    def _replace(self, rows: Iterable[Row]) -> None:
        assert self.path is not None
        with replacing(self.path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(rows)

    def _append(self) -> None:
        assert self.path is not None
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows(self._pending)
        except BaseException:
            os.truncate(self.path, size)
            raise


def open_curve_log(
    trainer: Trainer, name: str, columns: Sequence[str], logged_step: int
) -> CurveLog:
    """Return the log of a curve in the run's folder; all ranks call it.

    Nothing is written without a logger.

    Args:
        trainer: A trainer that is fitting.
        name: Name of the file without its ending.
        columns: Names of the columns after ``step``.
        logged_step: Step of the last rows that a checkpoint counts, -1 without one.
    """
    if not keeps_numbers(trainer):
        return CurveLog(None, columns, logged_step)
    path = run_folder(trainer) / f"{name}.csv"
    if logged_step < 0 and trainer.global_step > 0:
        logged_step = trainer.global_step  # a second fit of the same run
    log = CurveLog(path if trainer.is_global_zero else None, columns, logged_step)
    with training_goes_on(trainer, f"The file {path}"):
        log.trim()
    return log


def log_rows(trainer: Trainer, log: CurveLog | None, rows: Iterable[Row]) -> None:
    """Add rows of the present step to a log, if there is one; an error is a warning."""
    if log is not None and not trainer.sanity_checking:
        with training_goes_on(trainer, f"The rows of {log.path}"):
            log.add(trainer.global_step, rows)
