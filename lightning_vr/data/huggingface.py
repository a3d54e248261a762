"""Images of a Hugging Face data set that was written with ``save_to_disk``."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lightning_vr.data.datamodule import stratified_split
from lightning_vr.data.images import DecodedImages, ImageDataModule


class ImageColumn:
    """The images of one column, decoded on access.

    Args:
        rows: A ``datasets.Dataset``.
        column: A column of its ``datasets.Image`` type.
    """

    def __init__(self, rows: Any, column: str) -> None:
        self.rows = rows
        self.column = column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        image = self.rows[index][self.column]
        if image is None:
            raise ValueError("the row has no image")
        return image  # type: ignore[no-any-return]

    def name(self, index: int) -> str:
        """Return the row and column of an image.

        Args:
            index: Its position.
        """
        return f"in row {index}, column {self.column!r}"


class HuggingFaceImages(ImageDataModule):
    """Images of a Hugging Face data set on disk.

    Reads what ``datasets.Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote; nothing is
    downloaded. Needs the ``datasets`` package: ``pip install lightning-vr[datasets]``.

    Mirroring is an unlabelled augmentation, see :class:`lightning_vr.data.ImageFolder`.

    Args:
        path: Folder of the data set.
        size: Side of the square images, in pixels.
        batch_size: Samples per batch and process.
        image_column: Column of the images, of type ``datasets.Image``.
        label_column: Column of the classes, integers from 0; None for data without labels.
        train_split: Split to train on, if the data set has several.
        validation_split: Split to validate on; by default a fraction of the training split is
            held out.
        validation_fraction: Fraction of the images (of each class) to hold out if there is no
            validation split.
        channels: 1 for grey, 3 for colour.
        horizontal_flip: Whether to give every training image a second time, mirrored.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads them in the training process.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        batch_size: int = 128,
        image_column: str = "image",
        label_column: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        validation_fraction: float = 0.1,
        channels: Literal[1, 3] = 3,
        horizontal_flip: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            path,
            size,
            batch_size,
            channels,
            horizontal_flip,
            validation_fraction,
            seed,
            num_workers,
        )
        self.image_column = image_column
        self.label_column = label_column
        self.train_split = train_split
        self.validation_split = validation_split

    @cached_property
    def num_classes(self) -> int | None:
        """Number of classes of a ``ClassLabel`` column, else one more than the largest label."""
        if self.label_column is None:
            return None
        rows = self._split(self.train_split)
        declared = getattr(rows.features[self.label_column], "num_classes", None)
        return declared or int(self._labels(rows).max()) + 1

    def build_datasets(self) -> tuple[DecodedImages, DecodedImages]:
        """Return the training and the validation split, or two parts of the training split."""
        train = self._split(self.train_split)
        if self.validation_split is not None:
            validation = self._split(self.validation_split)
        else:
            groups = torch.zeros(len(train)) if self.label_column is None else self._labels(train)
            kept, held_out = stratified_split(groups, self.validation_fraction, self.seed)
            validation, train = train.select(held_out.tolist()), train.select(kept.tolist())
        return self._dataset(train, training=True), self._dataset(validation, training=False)

    def _dataset(self, rows: Any, training: bool) -> DecodedImages:
        label = None if self.label_column is None else self._labels(rows)
        return self.decoded(ImageColumn(rows, self.image_column), label, training)

    def _labels(self, rows: Any) -> Tensor:
        labels = rows[self.label_column][:]
        if not all(isinstance(label, int) for label in labels):
            raise ValueError(
                f"`label_column` must be a column of integers, got {self.label_column!r}, which "
                f"holds {rows.features[self.label_column]}, or rows without a label: use "
                f"`datasets.Dataset.class_encode_column`, and remove rows without a label."
            )
        return torch.tensor(labels, dtype=torch.int64)

    def _split(self, name: str) -> Any:
        """Return the rows of a split after a check of its columns."""
        splits = self._splits
        if name not in splits:
            raise ValueError(
                f"`train_split` and `validation_split` must be in {list(splits)}, the splits of "
                f"{self.path}, got {name!r}: use one of those."
            )

        features = splits[name].features
        images = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
        if self.image_column not in images:
            raise ValueError(
                f"`image_column` must be in {images}, the columns of images in {self.path}, got "
                f"{self.image_column!r}: use one of those."
            )
        if self.label_column is not None and self.label_column not in features:
            raise ValueError(
                f"`label_column` must be in {list(features)}, the columns of {self.path}, got "
                f"{self.label_column!r}: use one of those, or leave it out."
            )
        return splits[name].with_format(None)

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """All splits by name; a data set without splits is the training split."""
        try:
            from datasets import Dataset, load_from_disk
        except ImportError as error:
            raise ImportError(
                "HuggingFaceImages needs the `datasets` package: pip install lightning-vr[datasets]"
            ) from error

        try:
            loaded = load_from_disk(str(self.path))
        except FileNotFoundError as error:
            raise ValueError(
                f"`path` must be a folder that `save_to_disk` of `datasets` wrote, got {self.path}:"
                f" save the data set there first."
            ) from error
        return {self.train_split: loaded} if isinstance(loaded, Dataset) else dict(loaded)
