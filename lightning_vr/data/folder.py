"""A folder of image files as training data."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from lightning_vr.data.datamodule import stratified_split
from lightning_vr.data.image_formats import image_extensions, open_image
from lightning_vr.data.image_search import FoundImages, find_images
from lightning_vr.data.images import CACHE_BYTES, DecodedImages, ImageDataModule
from lightning_vr.data.pixels import Channels


class ImageFiles:
    """Image files.

    Args:
        paths: The files.
        max_pixels: Largest number of pixels of one, None for no limit.
    """

    def __init__(self, paths: Sequence[Path], max_pixels: int | None) -> None:
        self.paths = paths
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Open a file without decoding it.

        Args:
            index: Its position.
        """
        return open_image(self.paths[index], self.max_pixels)

    def name(self, index: int) -> str:
        """Return the path of a file.

        Args:
            index: Its position.
        """
        return str(self.paths[index])


class ImageFolder(ImageDataModule):
    """Images of a folder and its sub-folders, in the order of their paths.

    Hidden files and folders (a leading dot) are left out. Links are followed, but each file is
    taken once, and links back to a folder above them are left out; the log counts what is. Headers
    are read at ``setup``, up to 65,536 of them, and checksums of up to 4096 files.

    Of an animation the first frame is taken. Transparent images are composited on ``background``,
    or keep their transparency with four channels, which ``SampleGrid`` shows once the module's
    ``decode`` makes three of them. Grey images of 16 bits keep them. A file that changes after it
    was decoded is read again only without ``cache_bytes``.

    Mirroring is an unlabelled augmentation: the network does not know of it and learns the density
    of images and mirror images together. Both are samples with their own ``"index"``, so that
    references can hold both; an epoch is twice as long.

    Args:
        path: The folder; ``~`` is the home folder.
        size: Side of the square images, in pixels.
        batch_size: Samples per batch and process.
        channels: 1 for grey, 3 for colour, 4 for colour and alpha.
        labels_from_folders: Whether the first level of sub-folders names the classes, numbered in
            the order of their names.
        horizontal_flip: Whether to give every training image a second time, mirrored.
        validation_fraction: Fraction of the images (of each class) to hold out.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads them in the training process.
        background: Colour that transparent images are composited on: a name, ``"#rrggbb"``, or
            red, green and blue from 0 to 255.
        cache_bytes: Most memory for decoded images in each training process, which its workers
            share; 0 decodes them on every access.
        max_pixels: Largest number of pixels of an image file; Pillow's limit if not given.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        batch_size: int = 128,
        channels: Channels = 3,
        labels_from_folders: bool = False,
        horizontal_flip: bool = False,
        validation_fraction: float = 0.1,
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
        self.labels_from_folders = labels_from_folders

    @property
    def num_classes(self) -> int | None:
        """Number of sub-folders with images if they name the classes, else None."""
        return len(self.classes) if self.labels_from_folders else None

    @cached_property
    def classes(self) -> list[str]:
        """Names of the sub-folders with images, sorted: a label is a position in this list."""
        loose = [path for path in self._found.paths if len(path.parts) == 1]
        if loose:
            raise ValueError(
                f"`labels_from_folders` must be false unless every image is in a sub-folder of "
                f"{self.path}, got true and the image {loose[0]}: move it to a sub-folder, or set "
                f"`labels_from_folders` to false."
            )
        return sorted({path.parts[0] for path in self._found.paths})

    def build_datasets(self) -> tuple[DecodedImages, DecodedImages]:
        """Split the images by class."""
        paths = self._found.paths
        self._log_left_out()
        label = self._labels()
        is_deep = self.inspect(self._files(torch.arange(len(paths)))).deep > 0

        groups = torch.zeros(len(paths)) if label is None else label
        train, validation = (
            (self._files(rows), None if label is None else label[rows])
            for rows in stratified_split(groups, self.validation_fraction, self.seed)
        )
        return self.decoded(train, validation, is_deep=is_deep)

    def _files(self, rows: Tensor) -> ImageFiles:
        paths = [self.path / self._found.paths[row] for row in rows.tolist()]
        return ImageFiles(paths, self.max_pixels)

    def _labels(self) -> Tensor | None:
        if not self.labels_from_folders:
            return None
        number = {name: label for label, name in enumerate(self.classes)}
        return torch.tensor([number[path.parts[0]] for path in self._found.paths])

    def _log_left_out(self) -> None:
        found = self._found
        if found.left_out:
            rank_zero_info(
                f"ImageFolder takes {len(found.paths)} images of {self.path} and leaves out: "
                f"{found.left_out_text()}."
            )
        doubtful = [pair for pair in found.aliases if pair[0].parts[0] != pair[1].parts[0]]
        if self.labels_from_folders and doubtful:
            path, other = doubtful[0]
            rank_zero_info(
                f"ImageFolder: {len(doubtful)} links lead from one class to another, and an image "
                f"has one class: {path} is what {other} is, and has the class {other.parts[0]}."
            )

    @cached_property
    def _found(self) -> FoundImages:
        if not self.path.is_dir():
            raise ValueError(
                f"`path` must be an existing folder, got {self.path}: check its spelling."
            )
        found = find_images(self.path)
        if not found.paths:
            there = f" (there are: {found.left_out_text()})" if found.left_out else ""
            raise ValueError(
                f"`path` must be a folder of images, got {self.path}, and none of the files in it "
                f"and its sub-folders ends in {', '.join(image_extensions())}{there}: use another "
                f"folder, or convert the images."
            )
        return found
