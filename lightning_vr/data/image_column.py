"""The images of one column of a Hugging Face data set, and the classes of another."""

import reprlib
from copy import copy
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_vr.data.image_error import MissingImageError
from lightning_vr.data.image_formats import has_alpha, is_deep, open_image


class ImageColumn:
    """Images of one column, opened from their bytes, whatever the column's ``decode`` says.

    Args:
        rows: A ``datasets.Dataset``.
        column: A column of its ``datasets.Image`` type.
        positions: Rows of the images, in order.
        split: Name of the split for error messages; None if the data set has no splits.
        max_pixels: Largest number of pixels of an image, None for no limit.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        positions: Tensor,
        split: str | None,
        max_pixels: int | None,
    ) -> None:
        from datasets import Image as Feature

        self.feature = rows.features[column]
        raw = rows.select_columns([column]).cast_column(column, Feature(decode=False))
        self.rows = raw.with_format(None)
        self.column = column
        self.positions = positions
        self.split = split
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.positions)

    def open(self, index: int) -> Image.Image:
        """Open an image without decoding it.

        Args:
            index: Its position among the rows that were chosen.

        Raises:
            MissingImageError: If the row has none.
        """
        stored = self.rows[int(self.positions[index])][self.column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise MissingImageError
        if stored["bytes"] is not None:
            image = open_image(BytesIO(stored["bytes"]), self.max_pixels)
        elif "://" in stored["path"]:
            image = type(self.feature)().decode_example(stored)
        else:
            image = open_image(Path(stored["path"]), self.max_pixels)
        is_declared_grey = self.feature.mode in ("L", "LA")
        if is_declared_grey and not is_deep(image) and image.mode not in ("1", "L", "LA"):
            return image.convert("LA" if has_alpha(image) else "L")
        return image

    def name(self, index: int) -> str:
        """Return the row and column of an image, as the data set on disk has them.

        Args:
            index: Its position among the rows that were chosen.
        """
        return f"in {row_name(int(self.positions[index]), self.split)}, column {self.column!r}"

    def select(self, positions: Tensor) -> "ImageColumn":
        """Return some of the images, in order.

        Args:
            positions: Their positions among the rows that were chosen.
        """
        chosen = copy(self)
        chosen.positions = self.positions[positions]
        return chosen


def class_labels(rows: Any, column: str, split: str | None) -> Tensor:
    """Return the integers of a column, int64 of shape ``(N,)``.

    Args:
        rows: A ``datasets.Dataset``.
        column: The column.
        split: Name of the split for error messages; None if the data set has no splits.

    Raises:
        ValueError: If one is no integer of 0 or more; the error names its row.
    """
    feature = rows.features[column]
    is_integer = str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool"))
    labels = rows[column][:] if is_integer else rows[:1][column]
    for row, label in enumerate(labels):
        if isinstance(label, int) and label >= 0:
            continue
        if isinstance(label, str):
            fix = "number the names with `datasets.Dataset.class_encode_column`"
        elif is_integer:
            fix = "remove rows without a class with `datasets.Dataset.filter`"
        else:
            fix = "convert it with `datasets.Dataset.map`"
        raise ValueError(
            f"`label_column` must be a column of integers, each 0 or more, got {column!r}, which "
            f"holds {reprlib.repr(label)} in {row_name(row, split)}: {fix}."
        )
    return torch.tensor(labels, dtype=torch.int64)


def check_class_labels(
    labels: Tensor, num_classes: int | None, column: str, split: str | None
) -> None:
    """Raise if a class of a split is not among those of the training split.

    Args:
        labels: Classes of the split.
        num_classes: Number of classes of the training split.
        column: The column that they are from.
        split: Name of the split; None if the data set has no splits.

    Raises:
        ValueError: With the row of the first.
    """
    assert num_classes is not None
    wrong = (labels >= num_classes).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"`label_column` must hold classes of the training split, which are in [0, "
            f"{num_classes}), got {column!r}, which holds {int(labels[row])} in "
            f"{row_name(row, split)}: use a `ClassLabel` column, which knows all classes, or "
            f"remove that row."
        )


def row_name(row: int, split: str | None) -> str:
    """Return how error messages call a row of a data set on disk."""
    return f"row {row}" if split is None else f"row {row} of split {split!r}"
