"""Images of a user's own: decoded, cropped, resized and scaled one sample at a time.

An image is turned as its EXIF record says, cropped to its central square, resized with the bicubic
filter (which averages when it shrinks) and scaled from 8 bits to ``[-1, 1]``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lightning_vr.data.datamodule import SplitDataModule, expect_at_least
from lightning_vr.data.dataset import Sample, SampleDataset, check_labels

MEASURED_FOR_SIGMA = 1024


class ImageSource(Protocol):
    """Where images come from: a sequence that decodes on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...

    def name(self, index: int) -> str:
        """What to call an image in an error."""


class DecodedImages(SampleDataset):
    """Images decoded as they are asked for.

    Args:
        source: The images.
        label: Classes of shape ``(N,)``, or ``None``.
        num_classes: Number of classes; required with ``label``.
        size: Side of the square images, in pixels.
        channels: 1 for grey, 3 for colour.
        horizontal_flip: Whether to give every image a second time, mirrored: positions N to 2N - 1.
            So nothing is random, and a position stands for one picture, as references need it.

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
            check_labels(label, len(source), num_classes)
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
        """One image as it is, never mirrored.

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
        """Standard deviation over all pixels of at most 1024 evenly spaced images."""
        chosen = evenly_spaced(len(self.source), MEASURED_FOR_SIGMA)
        moments = torch.zeros(2, dtype=torch.float64)
        for index in chosen:
            image = self.decode(index).double()
            moments += torch.stack([image.mean(), image.square().mean()])

        mean, square = (moments / len(chosen)).tolist()
        return math.sqrt(max(square - mean**2, 0.0))


class ImageDataModule(SplitDataModule):
    """Images at one size, how they are mirrored and how they are split.

    Args:
        path: Where the images are.
        size: Side of the square images, in pixels.
        batch_size: Samples per batch and process.
        channels: 1 for grey, 3 for colour.
        horizontal_flip: Whether to give every training image a second time, mirrored.
        validation_fraction: Share of the images (of each class) that is held out.
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
        expect_at_least("size", size, 1)
        if channels not in (1, 3):
            raise ValueError(
                f"Argument `channels` expected to be 1 (grey) or 3 (colour), but got {channels}."
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
        """Images as a data set, mirrored only if they are for training.

        Args:
            source: The images.
            label: Classes of shape ``(N,)``, or ``None``.
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
    """Turns, crops, resizes and scales an image.

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
    """At most ``most`` positions out of ``count``, evenly spaced from the first.

    Args:
        count: Number of positions.
        most: Number of positions wanted.
    """
    chosen = min(count, most)
    return [count * position // chosen for position in range(chosen)]


def unreadable(name: str, error: Exception) -> ValueError:
    """The error of an image that cannot be used.

    Args:
        name: What to call the image.
        error: What its decoder said.
    """
    return ValueError(
        f"Image {name} cannot be read ({type(error).__name__}: {error}): repair or remove it."
    )
