"""The user's own images: decoded, cropped, resized and scaled one sample at a time.

An image is rotated as its EXIF record says, cropped to its central square, resized with the bicubic
filter (which averages when it shrinks) and scaled from 8 bits to ``[-1, 1]``.
"""

import math
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lightning_vr.core.validation import check_at_least, check_labels
from lightning_vr.data.datamodule import SplitDataModule
from lightning_vr.data.dataset import Sample, SampleDataset

MEASURED_FOR_SIGMA = 1024


class ImageSource(Protocol):
    """A sequence of images that decodes them on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...

    def name(self, index: int) -> str:
        """Return the name of an image for error messages."""


class DecodedImages(SampleDataset):
    """Images that are decoded on access.

    Args:
        source: The images.
        label: Classes of shape ``(N,)``, or None.
        num_classes: Number of classes; required with ``label``.
        size: Side of the square images, in pixels.
        channels: 1 for grey, 3 for colour.
        horizontal_flip: Whether to give every image a second time, mirrored: positions N to 2N - 1.
            Nothing is random: each position is one image, as references need it.

    Raises:
        ValueError: If a label is missing or outside ``[0, num_classes)``; on access, if an image
            cannot be read.
    """

    def __init__(
        self,
        source: ImageSource,
        label: Tensor | None,
        num_classes: int | None,
        *,
        size: int,
        channels: Literal[1, 3],
        horizontal_flip: bool = False,
    ) -> None:
        if label is not None:
            check_labels("label", label, num_classes, len(source))
        self.source = source
        self.label = label
        self.size = size
        self.channels = channels
        self.horizontal_flip = horizontal_flip

    def __len__(self) -> int:
        return len(self.source) * (1 + self.horizontal_flip)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        mirrored, row = divmod(index, len(self.source))
        image = self.decode(row)

        sample = {"image": image.flip(-1) if mirrored else image, "index": torch.tensor(index)}
        if self.label is not None:
            sample["label"] = self.label[row]
        return sample

    def decode(self, index: int) -> Tensor:
        """Return one image, not mirrored.

        Args:
            index: Its position in the source.

        Returns:
            float32 of shape ``(channels, size, size)`` in ``[-1, 1]``.

        Raises:
            ValueError: If it cannot be read; the error names it.
        """
        try:
            return to_tensor(self.source[index], self.size, self.channels)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            raise unreadable(self.source.name(index), error) from error

    def standard_deviation(self) -> float:
        """Return the standard deviation of all pixels of at most 1024 evenly spaced images."""
        chosen = evenly_spaced(len(self.source), MEASURED_FOR_SIGMA)
        moments = torch.zeros(2, dtype=torch.float64)
        for index in chosen:
            image = self.decode(index).double()
            moments += torch.stack([image.mean(), image.square().mean()])

        mean, square = (moments / len(chosen)).tolist()
        return math.sqrt(max(square - mean**2, 0.0))


class ImageDataModule(SplitDataModule):
    """Base of the data modules of images: their size, mirroring and split.

    Args:
        path: Folder of the images.
        size: Side of the square images, in pixels.
        batch_size: Samples per batch and process.
        channels: 1 for grey, 3 for colour.
        horizontal_flip: Whether to give every training image a second time, mirrored.
        validation_fraction: Fraction of the images (of each class) to hold out.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads them in the training process.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        batch_size: int,
        channels: Literal[1, 3],
        horizontal_flip: bool,
        validation_fraction: float,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_at_least("size", size, 1)
        if channels not in (1, 3):
            raise ValueError(
                f"`channels` must be 1 (grey) or 3 (colour), got {channels}: use 1 or 3, and "
                f"images are converted."
            )
        self.path = Path(path)
        self.size = size
        self.channels = channels
        self.horizontal_flip = horizontal_flip
        self.validation_fraction = validation_fraction
        self.seed = seed

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (self.channels, self.size, self.size)

    def decoded(self, source: ImageSource, label: Tensor | None, training: bool) -> DecodedImages:
        """Return images as a data set, mirrored only if they are for training.

        Args:
            source: The images.
            label: Classes of shape ``(N,)``, or None.
            training: Whether this is the training set.
        """
        return DecodedImages(
            source,
            label,
            self.num_classes,
            size=self.size,
            channels=self.channels,
            horizontal_flip=self.horizontal_flip and training,
        )


def to_tensor(image: Image.Image, size: int, channels: Literal[1, 3]) -> Tensor:
    """Rotate, crop, resize and scale an image.

    Args:
        image: An image of 8 bits per channel.
        size: Side of the square result, in pixels.
        channels: 1 for grey, 3 for colour.

    Returns:
        float32 of shape ``(channels, size, size)`` in ``[-1, 1]``.

    Raises:
        ValueError: If the image has more than 8 bits per channel, which a conversion would clip.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel: convert it first")
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("L" if channels == 1 else "RGB")

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)

    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(size, size, channels)
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most ``most`` positions out of ``count``, evenly spaced from the first.

    Args:
        count: Number of positions.
        most: Largest number of positions to return.
    """
    chosen = min(count, most)
    return [count * position // chosen for position in range(chosen)]


def unreadable(name: str, error: Exception) -> ValueError:
    """Return the error for an image that cannot be used.

    Args:
        name: Name of the image.
        error: The error of its decoder.
    """
    return ValueError(
        f"Image {name} cannot be read ({type(error).__name__}: {error}): repair or remove it."
    )
