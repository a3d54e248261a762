"""Conditions that samples are asked for: a table with a row for each, cycled over.

Its columns are texts, which a model's ``encode_condition`` turns into tensors, and ``label``, a
class. A CSV file names them in its first line; a text file is one prompt a line, the column
``prompt``.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LABEL, _PROMPT = "label", "prompt"

ConditionsSource = str | Path | dict[str, Any]
"""A file, or the columns themselves."""


@dataclass(frozen=True)
class Conditions:
    """Columns of equal length, of one row or more.

    Attributes:
        columns: Lists of texts, or tensors with a row for each condition.
        labels: Class labels ``(n,)``, int64, or None.
    """

    columns: dict[str, Any]
    labels: Tensor | None

    @classmethod
    def of(cls, source: ConditionsSource) -> "Conditions":
        """Read a file, or take columns.

        Raises:
            ValueError: If these are no such columns.
        """
        if not isinstance(source, Mapping):
            return cls.of(_read(Path(source).expanduser()))
        columns = {name: list(x) if isinstance(x, tuple) else x for name, x in source.items()}
        lengths = {len(x) if isinstance(x, list | Tensor) else None for x in columns.values()}
        if len(lengths) != 1 or lengths & {0, None}:
            raise ValueError(
                f"`conditions` must be columns of equally many rows, one at least, got "
                f"{ {name: len(x) if hasattr(x, '__len__') else x for name, x in columns.items()} }"
                f": give each column a list."
            )
        return cls(columns, _integers(columns.pop(_LABEL, None)))

    def __len__(self) -> int:
        columns = self.columns.values() if self.labels is None else [self.labels]
        return len(next(iter(columns)))

    def rows(self, numbers: Tensor) -> "Conditions":
        """Return the conditions of samples ``numbers (n,)``, over which the rows are cycled."""
        index = (numbers % len(self)).tolist()
        columns = {
            name: x[index] if isinstance(x, Tensor) else [x[i] for i in index]
            for name, x in self.columns.items()
        }
        return Conditions(columns, None if self.labels is None else self.labels[index])


def _integers(labels: Any) -> Tensor | None:
    if labels is None:
        return None
    try:
        return torch.tensor([int(label) for label in labels])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`conditions` must have whole numbers in the column 'label' ({error}): number the "
            f"classes from 0."
        ) from error


def _read(path: Path) -> dict[str, list[str]]:
    if path.suffix not in (".csv", ".txt"):
        raise ValueError(
            f"`conditions` must be a file of the kind .csv or .txt, got {path}: name the "
            f"columns in the first line of a CSV file, or write one prompt a line."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".txt":
                return {_PROMPT: file.read().splitlines()}
            table = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"`conditions` must be a text file in UTF-8, but {path} cannot be read ({error}): "
            f"correct the path or the file."
        ) from error
    header, rows = (table[0], [row for row in table[1:] if row]) if table else ([], [])
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"`conditions` must have the {len(header)} columns of its first line in each "
                f"line, but line {number} of {path} has {len(row)}: put quotes around texts with "
                f"commas."
            )
    return {name.strip(): [row[i] for row in rows] for i, name in enumerate(header)}
