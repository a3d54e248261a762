"""A CSV log that loses no row if the process is killed or the disk is full.

Lightning's writer empties the file and writes all rows anew whenever there is a new column: a kill
or a full disk at that moment loses them. Here a file with more columns is written beside the old
one and renamed, and rows that could not be written are written with the next ones.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_vr.lifecycle.atomic_files import replacing


class _WholeWriter(ExperimentWriter):
    """Lightning's writer with a ``save`` that appends rows or replaces the whole file."""

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
