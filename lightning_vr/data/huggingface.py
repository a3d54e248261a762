"""Images of a Hugging Face data set that was written with ``save_to_disk``."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vr.data.datamodule import stratified_split
from lightning_vr.data.dataset import Sample
from lightning_vr.data.huggingface_files import load_rows, split_names
from lightning_vr.data.image_column import ImageColumn, check_class_labels, class_labels
from lightning_vr.data.image_error import missing_image
from lightning_vr.data.images import CACHE_BYTES, DecodedImages, ImageDataModule
from lightning_vr.data.pixels import Channels

_Part = tuple[ImageColumn, Tensor | None]


class HuggingFaceImages(ImageDataModule):
    """Images of a Hugging Face data set on disk.

    Reads what ``datasets.Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote; nothing is
    downloaded. Needs the ``datasets`` package: ``pip install lightning-vr[datasets]``.

    Headers are read at ``setup``, up to 65,536 of them. Rows without an image are named there, and
    refused where a loader is made. Transparency, mirroring and 16 bits: see
    :class:`lightning_vr.data.ImageFolder`.

    Args:
        path: Folder of the data set; ``~`` is the home folder.
        size: Side of the square images, in pixels.
        batch_size: Samples per batch and process.
        image_column: Column of the images, of type ``datasets.Image``.
        label_column: Column of the classes, integers from 0; None for data without labels.
        train_split: Split to train on, if the data set has several.
        validation_split: Split to validate on; by default a fraction of the training split is
            held out.
        validation_fraction: Fraction of the images (of each class) to hold out if there is no
            validation split.
        channels: 1 for grey, 3 for colour, 4 for colour and alpha.
        horizontal_flip: Whether to give every training image a second time, mirrored.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads them in the training process.
        background: Colour that transparent images are composited on: a name, ``"#rrggbb"``, or
            red, green and blue from 0 to 255.
        cache_bytes: Most memory for decoded images in each training process, which its workers
            share; 0 decodes them on every access.
        max_pixels: Largest number of pixels of an image; Pillow's limit if not given.
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
        channels: Channels = 3,
        horizontal_flip: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        background: tuple[int, int, int] | str = "white",
        cache_bytes: int = CACHE_BYTES,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__(
            path,
            size,
            batch_size,
            channels,
            background,
            horizontal_flip,
            validation_fraction,
            seed,
            num_workers,
            cache_bytes,
            max_pixels,
        )
        self.image_column = image_column
        self.label_column = label_column
        self.train_split = train_split
        self.validation_split = validation_split
        self._missing: list[str] = []
        self._rows: dict[str, Any] = {}

    @cached_property
    def num_classes(self) -> int | None:
        """Number of classes of a ``ClassLabel`` column, else one more than the largest label."""
        if self.label_column is None:
            return None
        rows = self._split(self.train_split)
        declared = getattr(rows.features[self.label_column], "num_classes", None)
        return declared or int(self._labels(self.train_split).max()) + 1

    def build_datasets(self) -> tuple[DecodedImages, DecodedImages]:
        """Return the training and the validation split, or two parts of the training split."""
        train = self._images(self.train_split)
        deep = self._inspect(train[0])
        if self.validation_split is not None:
            validation = self._images(self.validation_split)
            deep += self._inspect(validation[0])
        else:
            groups = torch.zeros(len(train[0])) if train[1] is None else train[1]
            kept, held_out = stratified_split(groups, self.validation_fraction, self.seed)
            train, validation = _select(train, kept), _select(train, held_out)
        return self.decoded(train, validation, is_deep=deep > 0)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled batches, from the position of a resumed run on."""
        self._check_complete()
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the whole validation set, in order."""
        self._check_complete()
        return super().val_dataloader()

    def _images(self, split: str) -> _Part:
        rows = self._split(split)
        positions = torch.arange(len(rows))
        column = ImageColumn(
            rows, self.image_column, positions, self._split_name(split), self.max_pixels
        )
        if self.label_column is None:
            return column, None
        labels = self._labels(split)
        check_class_labels(labels, self.num_classes, self.label_column, self._split_name(split))
        return column, labels

    def _inspect(self, column: ImageColumn) -> int:
        """Look at the images of a split; return the number of those with 16 bits."""
        found = self.inspect(column)
        if found.missing:
            self._missing += found.missing
            rank_zero_info(
                f"HuggingFaceImages: {len(found.missing)} of {found.opened} rows have no image, "
                f"the first is the one {found.missing[0]}. No loader is made before they are "
                f"removed, as with `datasets.Dataset.filter`."
            )
        return found.deep

    def _check_complete(self) -> None:
        """Raise before training, rather than in its middle, if rows have no image."""
        if self._missing:
            raise missing_image(self._missing[0])

    def _labels(self, split: str) -> Tensor:
        assert self.label_column is not None
        return class_labels(self._split(split), self.label_column, self._split_name(split))

    def _split_name(self, split: str) -> str | None:
        """Return the name of a split for error messages; None if the data set has no splits."""
        return split if self._has_splits else None

    def _split(self, name: str) -> Any:
        """Return the rows of a split after a check of its columns."""
        if name not in self._folders:
            raise ValueError(
                f"`train_split` and `validation_split` must be in {list(self._folders)}, the "
                f"splits of {self.path}, got {name!r}: use one of those."
            )
        if name not in self._rows:
            rows = load_rows(self._folders[name])
            self._check_columns(rows.features)
            self._rows[name] = rows.with_format(None)
        return self._rows[name]

    def _check_columns(self, features: Any) -> None:
        images = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
        if self.image_column not in images:
            kind = features.get(self.image_column)
            what = "" if kind is None else f", a column of type {kind}"
            fix = (
                "use one of those"
                if images
                else "convert a column of paths or bytes with "
                "`datasets.Dataset.cast_column(column, datasets.Image())`"
            )
            raise ValueError(
                f"`image_column` must be in {images}, the columns of images in {self.path}, got "
                f"{self.image_column!r}{what}; its columns are {list(features)}: {fix}."
            )
        if self.label_column is not None and self.label_column not in features:
            raise ValueError(
                f"`label_column` must be in {list(features)}, the columns of {self.path}, got "
                f"{self.label_column!r}: use one of those, or leave it out."
            )

    @property
    def _has_splits(self) -> bool:
        return self.path not in self._folders.values()

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """The folder of each split; a data set without splits is the training split."""
        names = split_names(self.path)
        if names is None:
            return {self.train_split: self.path}
        return {name: self.path / name for name in names}


def _select(part: _Part, positions: Tensor) -> _Part:
    column, labels = part
    return column.select(positions), None if labels is None else labels[positions]
