"""Rows of draws: what a loss needs of each, as nested dictionaries of tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Bundle = TypeVar("Bundle")

Rows = dict[str, Any]
"""What a loss needs of each draw: tensors ``(n, *)``, or dictionaries of these."""


def interleaved(draws: Sequence[Rows]) -> Rows:
    """Put corresponding rows of several draws next to each other."""
    first = draws[0]
    return {
        name: (
            interleaved([rows[name] for rows in draws])
            if isinstance(first[name], dict)
            else torch.stack([rows[name] for rows in draws], dim=1).flatten(0, 1)
        )
        for name in first
    }


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Put the rows of several parts one after the other."""
    return {
        name: (
            concatenated([rows[name] for rows in parts])
            if isinstance(first, dict)
            else torch.cat([rows[name] for rows in parts])
        )
        for name, first in parts[0].items()
    }


def mapped(rows: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
    """Return rows with every tensor replaced by its function."""
    return {
        name: mapped(x, function) if isinstance(x, dict) else function(x)
        for name, x in rows.items()
    }


def rows_at(rows: Rows, index: slice | Tensor | tuple[slice, None]) -> Rows:
    """Return the rows at an index of each tensor."""
    return mapped(rows, lambda x: x[index])


def in_chunks(rows: Rows, chunk: int) -> Iterator[Rows]:
    """Yield ``chunk`` rows at a time."""
    for start in range(0, row_count(rows), chunk):
        yield rows_at(rows, slice(start, start + chunk))


def tensors(bundle: Any) -> Rows:
    """Return what a dataclass holds as rows; what is None is left out."""
    return {name: value for name, value in vars(bundle).items() if value is not None}


def detached(bundle: Bundle) -> Bundle:
    """Return a dataclass without the graph that its tensors, at any depth, were made by."""
    values = {name: _detached(value) for name, value in vars(bundle).items()}
    return type(bundle)(**values)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: _detached(part) for name, part in value.items()}
    return detached(value) if is_dataclass(value) else value


def leaves(rows: Rows) -> list[Tensor]:
    """Return all tensors of rows in order."""
    return [
        tensor
        for value in rows.values()
        for tensor in (leaves(value) if isinstance(value, dict) else [value])
    ]


def row_count(rows: Rows) -> int:
    """Return the number of rows."""
    return len(leaves(rows)[0])
