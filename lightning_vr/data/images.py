"""The user's own images as data sets: decoded on access, and kept as far as memory lasts.

What happens to an image stands in ``pixels.py``. Pixels of 8 bits (16 of grey images that have
them) are kept in memory; a sample is the same whether its pixels were kept or decoded anew.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_vr.core.validation import check_at_least, check_choice, check_labels
from lightning_vr.data.datamodule import SplitDataModule
from lightning_vr.data.dataset import Sample, SampleDataset
from lightning_vr.data.image_error import unreadable
from lightning_vr.data.image_formats import pillow_pixel_limit, pixel_limit
from lightning_vr.data.inspection import ImageSource, Inspection, evenly_spaced, inspect_images
from lightning_vr.data.pixel_cache import PixelCache
from lightning_vr.data.pixels import (
    WHITE,
    Channels,
    Colour,
    Pixels,
    parse_colour,
    scaled,
    to_pixels,
)

MEASURED_FOR_SIGMA = 1024
CACHE_BYTES = 2**30

Labelled = tuple[ImageSource, Tensor | None]
"""Images and their classes of shape ``(N,)``."""


class DecodedImages(SampleDataset):
    """Images that are decoded on access.

    Args:
        source: The images.
        label: Classes of shape ``(N,)``, or None.
        num_classes: Number of classes; required with ``label``.
        size: Side of the square images, in pixels.
        channels: 1 for grey, 3 for colour, 4 for colour and alpha.
        background: What transparent images are composited on.
        horizontal_flip: Whether to give every image a second time, mirrored: positions N to 2N - 1.
            Nothing is random: each position is one image, as references need it.
        cache: Where to keep decoded images, or None.
        max_pixels: Largest number of pixels of a frame, None for no limit.

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
        channels: Channels,
        background: Colour = WHITE,
        horizontal_flip: bool = False,
        cache: PixelCache | None = None,
        max_pixels: int | None = None,
    ) -> None:
        if label is not None:
            check_labels("label", label, num_classes, len(source))
        self.source = source
        self.label = label
        self.size = size
        self.channels = channels
        self.background = background
        self.horizontal_flip = horizontal_flip
        self.cache = cache
        self.max_pixels = max_pixels

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
            ImageError: If it cannot be read; the error names it.
        """
        return scaled(self._pixels(index))

    def stored_samples(self) -> tuple[list[Tensor], Tensor | None] | None:
        """Decode all images and return their kept pixels, and a copy of the mirrored ones.

        Returns:
            Parts ``(N, *)`` and labels, or None unless all are kept, with 8 bits.
        """
        if self.cache is None or self.cache.capacity < len(self.source):
            return None
        for index in range(len(self.source)):
            self._pixels(index)
        pixels = self.cache.whole()
        if pixels is None:
            return None
        parts = [pixels, pixels.flip(-1)] if self.horizontal_flip else [pixels]
        return parts, None if self.label is None else self.label.repeat(len(parts))

    def standard_deviation(self) -> float:
        """Return the standard deviation of all pixels of at most 1024 evenly spaced images."""
        chosen = evenly_spaced(len(self.source), MEASURED_FOR_SIGMA)
        moments = torch.zeros(2, dtype=torch.float64)
        for index in chosen:
            image = self.decode(index).double()
            moments += torch.stack([image.mean(), image.square().mean()])

        mean, square = (moments / len(chosen)).tolist()
        return math.sqrt(max(square - mean**2, 0.0))

    def _pixels(self, index: int) -> Pixels:
        pixels = None if self.cache is None else self.cache.get(index)
        if pixels is None:
            pixels = self._decoded(index)
            if self.cache is not None:
                self.cache.put(index, pixels)
        return pixels

    def _decoded(self, index: int) -> Pixels:
        try:
            with self.source.open(index) as image, pixel_limit(self.max_pixels):
                return to_pixels(image, self.size, self.channels, self.background)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            raise unreadable(self.source.name(index), error) from error


class ImageDataModule(SplitDataModule):
    """Base of the data modules of images: their size, mirroring and split.

    Args:
        path: Folder of the images; ``~`` is the home folder.
        size: Side of the square images, in pixels.
        batch_size: Samples per batch and process.
        channels: 1 for grey, 3 for colour, 4 for colour and alpha.
        background: Colour that transparent images are composited on.
        horizontal_flip: Whether to give every training image a second time, mirrored.
        validation_fraction: Fraction of the images (of each class) to hold out.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads them in the training process.
        cache_bytes: Most memory for decoded images in each training process, which its workers
            share; 0 decodes them on every access.
        max_pixels: Largest number of pixels of an image file; Pillow's limit if not given.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        batch_size: int,
        channels: Channels,
        background: str | Sequence[int],
        horizontal_flip: bool,
        validation_fraction: float,
        seed: int,
        num_workers: int,
        cache_bytes: int,
        max_pixels: int | None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_at_least("size", size, 1)
        check_choice("channels", channels, get_args(Channels))
        check_at_least("cache_bytes", cache_bytes, 0)
        if max_pixels is not None:
            check_at_least("max_pixels", max_pixels, 1)
        self.path = Path(os.path.expanduser(path))
        self.size = size
        self.channels = channels
        self.background = parse_colour("background", background)
        self.horizontal_flip = horizontal_flip
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.cache_bytes = cache_bytes
        self.max_pixels = pillow_pixel_limit() if max_pixels is None else max_pixels

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (self.channels, self.size, self.size)

    def inspect(self, source: ImageSource) -> Inspection:
        """Look at images before training, and say in the log what becomes of transparency.

        Args:
            source: The images.

        Raises:
            ImageError: If one cannot be read or trained on; the error names it.
        """
        is_shown = self.trainer is None or self.trainer.is_global_zero
        found = inspect_images(source, is_shown=is_shown)
        name = type(self).__name__
        if found.transparent:
            fate = (
                "it is the fourth channel"
                if self.channels == 4
                else f"they are composited on `background`, which is {self.background}; "
                f"`channels` of 4 keeps the transparency"
            )
            rank_zero_info(
                f"{name}: {len(found.with_alpha)} of {found.opened} images have transparency, and "
                f"of {found.decoded} of them that were decoded {found.transparent} use it: {fate}."
            )
        elif self.channels == 4:
            rank_zero_info(
                f"{name}: none of {found.opened} images is transparent: the fourth channel is 1 "
                f"throughout, and `channels` of 3 would do."
            )
        return found

    def decoded(
        self, train: Labelled, validation: Labelled, *, is_deep: bool
    ) -> tuple[DecodedImages, DecodedImages]:
        """Return images as data sets, of which the first is mirrored too if so configured.

        Args:
            train: The training images.
            validation: The validation images.
            is_deep: Whether some images are grey with 16 bits.
        """
        counts = len(train[0]), len(validation[0])
        caches = [
            PixelCache(
                count,
                self.shape,
                is_deep=is_deep,
                max_bytes=self.cache_bytes * count // sum(counts),
            )
            for count in counts
        ]
        self._log_caches(caches, sum(counts))
        first, second = (
            DecodedImages(
                source,
                label,
                self.num_classes,
                size=self.size,
                channels=self.channels,
                background=self.background,
                horizontal_flip=self.horizontal_flip and is_train,
                cache=cache if cache.capacity else None,
                max_pixels=self.max_pixels,
            )
            for (source, label), cache, is_train in zip(
                (train, validation), caches, (True, False), strict=True
            )
        )
        return first, second

    def _log_caches(self, caches: list[PixelCache], count: int) -> None:
        kept, name = sum(cache.capacity for cache in caches), type(self).__name__
        if kept == 0:
            rank_zero_info(
                f"{name} decodes images on every access, as `cache_bytes` is {self.cache_bytes}."
            )
            return
        part = f"all {count} images" if kept == count else f"{kept} of {count} images"
        size = sum(cache.bytes for cache in caches)
        rank_zero_info(
            f"{name} keeps {part} in memory once they are decoded, in {size / 1e6:.3g} MB that "
            f"workers share (`cache_bytes` is {self.cache_bytes})."
        )
