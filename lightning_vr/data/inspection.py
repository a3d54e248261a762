"""A look at images before training: what could not be trained on is found here, not after an hour.

The headers of at most 65,536 images are read, and of at most 4096 the checksums. Few are decoded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from lightning_vr.core.progress import progress_bar
from lightning_vr.data.image_error import MissingImageError, unreadable
from lightning_vr.data.image_formats import check_mode, has_alpha, is_deep
from lightning_vr.data.pixels import is_transparent

OPENED = 65536
VERIFIED = 4096
DECODED = 32


class ImageSource(Protocol):
    """A sequence of images that opens them on access."""

    def __len__(self) -> int: ...

    def open(self, index: int, /) -> Image.Image:
        """Open an image without decoding it."""

    def name(self, index: int, /) -> str:
        """Return the name of an image for error messages."""


@dataclass
class Inspection:
    """What is known of images before they are decoded.

    Attributes:
        opened: Number of rows that were looked at.
        missing: Names of rows without an image.
        deep: Number of grey images with 16 bits.
        with_alpha: Positions of images that may be transparent.
        decoded: Number of those that were decoded.
        transparent: Number of those with a transparent pixel.
    """

    opened: int = 0
    missing: list[str] = field(default_factory=list)
    deep: int = 0
    with_alpha: list[int] = field(default_factory=list)
    decoded: int = 0
    transparent: int = 0


def inspect_images(source: ImageSource, *, is_shown: bool) -> Inspection:
    """Read the headers of images, and see whether some are transparent.

    Args:
        source: The images.
        is_shown: Whether to show a progress bar if it takes longer than a second.

    Raises:
        ImageError: If one cannot be read or trained on; the error names it.
    """
    found = Inspection()
    verified = set(evenly_spaced(len(source), VERIFIED))
    chosen: Iterable[int] = evenly_spaced(len(source), OPENED)
    for index in progress_bar(chosen, "Images", is_shown=is_shown):
        try:
            _inspect(source, index, found, verify=index in verified)
        except MissingImageError:
            found.missing.append(source.name(index))
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            raise unreadable(source.name(index), error) from error
        found.opened += 1
    for position in evenly_spaced(len(found.with_alpha), DECODED):
        index = found.with_alpha[position]
        try:
            with source.open(index) as image:
                found.transparent += is_transparent(image)
        except Exception as error:
            raise unreadable(source.name(index), error) from error
        found.decoded += 1
    return found


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most ``most`` positions out of ``count``, evenly spaced from the first.

    Args:
        count: Number of positions.
        most: Largest number of positions to return.
    """
    chosen = min(count, most)
    return [count * position // chosen for position in range(chosen)]


def _inspect(source: ImageSource, index: int, found: Inspection, *, verify: bool) -> None:
    with source.open(index) as image:
        check_mode(image)
        found.deep += is_deep(image)
        if has_alpha(image):
            found.with_alpha.append(index)
        if verify:
            image.verify()
