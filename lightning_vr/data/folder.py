"""A folder of image files as training data."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from lightning_vr.data.datamodule import stratified_split
from lightning_vr.data.images import DecodedImages, ImageDataModule, evenly_spaced, unreadable

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CHECKED_AT_SETUP = 4096


class ImageFiles:
    """Image files, decoded on access.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        """Return the path of a file.

        Args:
            index: Its position.
        """
        return str(self.paths[index])

    def verify(self) -> None:
        """Check the structure of the files, of at most 4096 evenly spaced ones.

        Raises:
            ValueError: If one is not an image; the error names it.
        """
        for index in evenly_spaced(len(self), CHECKED_AT_SETUP):
            try:
                with Image.open(self.paths[index]) as image:
                    image.verify()
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
                raise unreadable(self.name(index), error) from error


class ImageFolder(ImageDataModule):
    """Images of a folder and its sub-folders, in the order of their paths.

    Hidden files and folders (a leading dot) are left out, links are followed, transparency is
    dropped. Files are checked at ``setup``, up to 4096 of them, and again when they are decoded.

    Mirroring is an unlabelled augmentation: the network does not know of it and learns the density
    of images and mirror images together. Both are samples with their own ``"index"``, so that
    references can hold both; an epoch is twice as long.

    Args:
        path: The folder.
        size: Side of the square images, in pixels.
        batch_size: Samples per batch and process.
        channels: 1 for grey, 3 for colour.
        labels_from_folders: Whether the first level of sub-folders names the classes, numbered in
            the order of their names.
        horizontal_flip: Whether to give every training image a second time, mirrored.
        validation_fraction: Fraction of the images (of each class) to hold out.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads them in the training process.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        batch_size: int = 128,
        channels: Literal[1, 3] = 3,
        labels_from_folders: bool = False,
        horizontal_flip: bool = False,
        validation_fraction: float = 0.1,
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
        self.labels_from_folders = labels_from_folders

    @property
    def num_classes(self) -> int | None:
        """Number of sub-folders with images if they name the classes, else None."""
        return len(self.classes) if self.labels_from_folders else None

    @cached_property
    def classes(self) -> list[str]:
        """Names of the sub-folders with images, sorted: a label is a position in this list."""
        loose = [path for path in self._files if len(path.parts) == 1]
        if loose:
            raise ValueError(
                f"`labels_from_folders` must be false unless every image is in a sub-folder of "
                f"{self.path}, got true and the image {loose[0]}: move it to a sub-folder, or set "
                f"`labels_from_folders` to false."
            )
        return sorted({path.parts[0] for path in self._files})

    def build_datasets(self) -> tuple[DecodedImages, DecodedImages]:
        """Split the images by class."""
        ImageFiles([self.path / path for path in self._files]).verify()
        label = self._labels()

        groups = torch.zeros(len(self._files)) if label is None else label
        train, validation = stratified_split(groups, self.validation_fraction, self.seed)
        return (
            self._dataset(train, label, training=True),
            self._dataset(validation, label, training=False),
        )

    def _dataset(self, rows: Tensor, label: Tensor | None, training: bool) -> DecodedImages:
        files = ImageFiles([self.path / self._files[row] for row in rows.tolist()])
        return self.decoded(files, None if label is None else label[rows], training)

    def _labels(self) -> Tensor | None:
        if not self.labels_from_folders:
            return None
        number = {name: label for label, name in enumerate(self.classes)}
        return torch.tensor([number[path.parts[0]] for path in self._files])

    @cached_property
    def _files(self) -> list[Path]:
        """Sorted paths relative to the folder."""
        if not self.path.is_dir():
            raise ValueError(
                f"`path` must be an existing folder, got {self.path}: check its spelling."
            )

        files = []
        for folder, subfolders, names in os.walk(self.path, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            files += [
                Path(folder, name).relative_to(self.path)
                for name in names
                if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
            ]

        if not files:
            raise ValueError(
                f"`path` must be a folder of images, got {self.path}, and none of the files in it "
                f"and its sub-folders ends in {', '.join(EXTENSIONS)}: use another folder, or "
                f"convert the images."
            )
        return sorted(files)
