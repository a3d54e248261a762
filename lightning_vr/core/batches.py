"""Rows of a batch of any structure: tensors and texts in tuples, dictionaries and dataclasses."""

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

_ROWS = (Tensor, list, tuple)
"""What may have one entry for each sample: collate functions make lists of texts."""


def batch_size(batch: Any) -> int:
    """Return the number of rows of the first tensor of a batch.

    Raises:
        ValueError: If it has no tensor with rows.
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda x: sizes.append(len(x)) if x.ndim else None)
    if not sizes:
        raise ValueError(
            f"The batch must hold a tensor with one row for each sample, "
            f"got {type(batch).__name__}: let the collate function stack tensors."
        )
    return sizes[0]


def take_rows(batch: Any, start: int, stop: int) -> Any:
    """Return a batch of the rows ``start`` to ``stop``, without the rest of its samples."""
    size = batch_size(batch)

    def rows(x: Any) -> Any:
        if isinstance(x, Tensor) or all(isinstance(each, str) for each in x):
            is_scalar = isinstance(x, Tensor) and x.ndim == 0
            return x if is_scalar or len(x) != size else x[start:stop]
        parts = [apply_to_collection(each, _ROWS, rows) for each in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)

    return apply_to_collection(batch, _ROWS, rows)


def is_plain(batch: Any) -> bool:
    """Return whether a batch holds only tensors, texts and numbers, as files safely do."""
    if isinstance(batch, dict):
        return all(isinstance(key, str) and is_plain(value) for key, value in batch.items())
    if isinstance(batch, (list, tuple)):
        return type(batch) in (list, tuple) and all(map(is_plain, batch))
    return type(batch) in (Tensor, str, int, float, bool)
