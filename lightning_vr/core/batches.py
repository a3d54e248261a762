"""Rows of a batch, whatever it is made of: tensors and texts in tuples, dictionaries and so on."""

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class _IsText(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, (list, tuple)) and all(isinstance(each, str) for each in x)


class _Texts(metaclass=_IsText):
    """What collate functions make of one text for each sample."""


def batch_size(batch: Any) -> int:
    """Return the number of rows of the first tensor of a batch.

    Raises:
        ValueError: If it has no tensor with rows.
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda x: sizes.append(len(x)) if x.ndim else None)
    if not sizes:
        raise ValueError(
            f"The batch expected to hold a tensor with one row for each sample, "
            f"but got {type(batch).__name__}: let the collate function stack tensors."
        )
    return sizes[0]


def take_rows(batch: Any, start: int, stop: int) -> Any:
    """Return a batch of the rows ``start`` to ``stop``, without the rest of its samples."""
    size = batch_size(batch)

    def rows(x: Any) -> Any:
        is_scalar = isinstance(x, Tensor) and x.ndim == 0
        return x if is_scalar or len(x) != size else x[start:stop]

    return apply_to_collection(batch, (Tensor, _Texts), rows)


def is_plain(batch: Any) -> bool:
    """Tell whether a batch is made of tensors, texts and numbers alone, as files safely hold it."""
    if isinstance(batch, dict):
        return all(isinstance(key, str) and is_plain(value) for key, value in batch.items())
    if isinstance(batch, (list, tuple)):
        return type(batch) in (list, tuple) and all(map(is_plain, batch))
    return type(batch) in (Tensor, str, int, float, bool)
