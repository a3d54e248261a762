"""What the rows share: folder, budget of processor time, tables that grow, means with errors."""

import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_vr.auditing import measurement
from lightning_vr.core import devices


class OutOfTimeError(Exception):
    """The budget is used up; what was measured is in the tables."""


class CheckFailedError(Exception):
    """What a row checks is not so; it has printed what."""


def processor_seconds() -> float:
    """Return those of this process, and of what it has started and waited for."""
    return sum(os.times()[:4])


@dataclass
class Study:
    """Where a row writes, on what, and how long.

    Attributes:
        folder: For tables, pictures and checkpoints.
        data: Folder with the folders ``cifar10`` and ``mnist`` of images, or None.
        budget: Processor seconds after which no further part is begun.
        is_quick: Whether to take the smallest sizes, to see that it runs.
        predictions: The ``results.csv`` of ``examples/audit/recommendations.py``.
    """

    folder: Path
    data: Path | None = None
    budget: float = math.inf
    is_quick: bool = False
    predictions: Path = Path("runs/audit_recommendations/results.csv")
    started: float = field(default_factory=processor_seconds)

    def check_time(self) -> None:
        """Raise if the budget is used up: called before each part."""
        if processor_seconds() - self.started > self.budget:
            raise OutOfTimeError

    def images(self, name: str) -> Path | None:
        """Return the folder of a set of images, or say that the part is left out."""
        path = None if self.data is None else self.data / name
        if path is None or not path.is_dir():
            print(f"{name} is left out: give its images by --data FOLDER, as FOLDER/{name}.")
            return None
        return path


class Table:
    """A CSV file to which rows are added, and which knows what is done.

    Args:
        path: The file.
        keys: Columns that name a row.
        values: Columns of what was measured.
    """

    def __init__(self, path: Path, keys: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.keys, self.columns = path, keys, [*keys, *values]
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def has(self, *key: object) -> bool:
        return any([row[name] for name in self.keys] == [*map(str, key)] for row in self.rows)

    def add(self, **row: object) -> None:
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: str(value) for name, value in row.items()})

    def select(self, column: str, **key: object) -> list[float]:
        """Return a column of the rows with the given keys, in order."""
        wanted = {name: str(value) for name, value in key.items()}
        return [
            float(row[column])
            for row in self.rows
            if all(row[name] == value for name, value in wanted.items())
        ]


@contextmanager
def processor_clock() -> Iterator[None]:
    """Let audits count processor seconds, which other work of the machine does not lengthen."""
    clock = SimpleNamespace(perf_counter=time.process_time)
    with mock.patch.object(measurement, "time", clock), mock.patch.object(devices, "time", clock):
        yield


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval, by Student's t over repetitions."""
    found, n = np.asarray(values, float), len(values)
    if n < 2:
        return float(found.mean()), math.nan
    half = float(stdtrit(n - 1, 0.975)) * float(found.std(ddof=1)) / math.sqrt(n)
    return float(found.mean()), half


def interval(values: Sequence[float], digits: int = 3) -> str:
    mean, half = mean_and_half(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def bootstrap(
    statistic: Callable[[Tensor], float], count: int, repeats: int = 500
) -> tuple[float, float, float]:
    """Return a statistic of the rows ``0 .. count - 1`` and its 95 % interval over rows."""
    source = torch.Generator().manual_seed(0)
    drawn = [statistic(torch.randint(count, (count,), generator=source)) for _ in range(repeats)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return statistic(torch.arange(count)), float(low), float(high)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
