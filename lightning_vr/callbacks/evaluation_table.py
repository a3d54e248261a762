"""The table of an evaluation: what was measured, with standard errors, as files and for loggers."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import markdown_table

COLUMNS = (
    "measure",
    "value",
    "standard error",
    "samples",
    "repeats",
    "seconds",
    "network evaluations",
    "settings",
)


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        measure: What was measured.
        value: Mean over repeats, or over samples.
        standard_error: That of the mean; None where there is one repeat.
        samples: Number of samples in each repeat.
        repeats: Number of disjoint sets of samples.
        settings: What the value depends on beyond the model.
        seconds: What it takes alone, the drawing of its samples included; not the reading of those
            that they are compared with.
        evaluations: Calls of the network for each sample; None if they are not known.
    """

    measure: str
    value: float
    standard_error: float | None
    samples: int
    repeats: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    evaluations: int | None = None

    @classmethod
    def of_repeats(
        cls, measure: str, values: Sequence[float], samples: int, **settings: Any
    ) -> "Measurement":
        """Return the mean of what several sets of samples gave, and its standard error."""
        error = standard_error(values)
        return cls(measure, mean(values), error, samples, len(values), settings)

    def row(self) -> list[float | str]:
        """Return the cells of ``COLUMNS``; one is empty where there is no number."""
        error = "" if self.standard_error is None else self.standard_error
        settings = ", ".join(f"{name} {_text(value)}" for name, value in self.settings.items())
        counts = (str(self.samples), str(self.repeats))
        evaluations = "" if self.evaluations is None else str(self.evaluations)
        return [self.measure, self.value, error, *counts, self.seconds, evaluations, settings]


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values, None if there is only one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def markdown(measurements: Sequence[Measurement]) -> str:
    """Return the table in Markdown, with numbers of four digits."""
    return markdown_table(COLUMNS, [each.row() for each in measurements])


def save(measurements: Sequence[Measurement], folder: Path) -> None:
    """Write ``evaluation.csv``, ``evaluation.md`` and ``evaluation.json`` to a folder."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerows([COLUMNS, *(each.row() for each in measurements)])
    texts = {
        "evaluation.csv": lines.getvalue(),
        "evaluation.md": markdown(measurements) + "\n",
        "evaluation.json": json.dumps([asdict(each) for each in measurements], indent=2) + "\n",
    }
    for name, text in texts.items():
        with replacing(folder / name, "w", encoding="utf-8", newline="") as file:
            file.write(text)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
