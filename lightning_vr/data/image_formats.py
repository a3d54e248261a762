"""What Pillow reads from a file: which files are images, how large they may be, and their pixels.

Pillow keeps the one transparent value of a grey or colour PNG as it stands in the file, but scales
pixels of 2, 4 and 16 bits to 8 (seen in 13.0), so that the value meets no pixel: here it is scaled
too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageFile, features

from lightning_vr.data.image_error import UnsuitableImageError

_ALWAYS = (
    *(".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".tga", ".tif", ".tiff"),
)
_WITH_FEATURE = {".avif": "avif", ".jp2": "jpg_2000", ".webp": "webp"}
_WITH_PLUGIN = (".heic", ".heif", ".jxl")

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY_SCALES = {"L;2": 85, "L;4": 17}


def image_extensions() -> list[str]:
    """Return the extensions of the image files that this Pillow decodes, sorted."""
    supported = features.get_supported()
    optional = [extension for extension, name in _WITH_FEATURE.items() if name in supported]
    plugins = [extension for extension in _WITH_PLUGIN if extension in Image.EXTENSION]
    return sorted([*_ALWAYS, *optional, *plugins])


def pillow_pixel_limit() -> int | None:
    """Return the number of pixels above which Pillow refuses an image, None for no limit."""
    warned_of = Image.MAX_IMAGE_PIXELS
    return None if warned_of is None else 2 * warned_of


def open_image(file: Path | IO[bytes], max_pixels: int | None) -> Image.Image:
    """Open an image without decoding it.

    Args:
        file: The file.
        max_pixels: Largest number of pixels, None for no limit.

    Raises:
        UnsuitableImageError: If it is larger.
    """
    with pixel_limit(None):  # Pillow's own error does not name the image
        image = Image.open(file)
    pixels = image.width * image.height
    if max_pixels is not None and pixels > max_pixels:
        image.close()
        raise UnsuitableImageError(
            f"has {image.width} x {image.height} = {pixels} pixels, above the limit of "
            f"{max_pixels}, which keeps a broken or hostile file from filling the memory: if you "
            f"trust it, set `max_pixels` to {pixels} or more, else shrink or remove it."
        )
    if image.format == "PNG" and "transparency" in image.info:
        _scale_transparency(image)
    return image


@contextmanager
def pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Let Pillow refuse frames of more pixels while it decodes, and not warn below.

    Args:
        max_pixels: The limit, None for none.
    """
    previous = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def check_mode(image: Image.Image) -> None:
    """Raise if the pixels of an image are numbers whose range is not known.

    Raises:
        UnsuitableImageError: With the mode.
    """
    if image.mode.startswith(("I", "F")) and not is_deep(image):
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise UnsuitableImageError(
            f"has mode {image.mode}, {kind} whose black and white are not known: scale it to 8 or "
            f"16 bits per channel."
        )


def is_deep(image: Image.Image) -> bool:
    """Return whether an image is grey with 16 bits, or fewer that Pillow does not scale."""
    is_from_16_bits = image.mode == "I" and image.format in ("PNG", "PPM")
    return image.mode.startswith("I;16") or is_from_16_bits


def grey_range(image: Image.Image) -> tuple[int, int]:
    """Return the values of black and white in a grey image of 16 bits.

    Args:
        image: An image as it was opened: a converted one does not know its file.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits, meaning_of_zero = tags.get(258, (16,))[0], tags.get(262, 1)
    largest = 2**bits - 1
    return (largest, 0) if meaning_of_zero == 0 else (0, largest)


def has_alpha(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel, a transparent colour or such a palette."""
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return True
    palette = image.palette if image.mode == "P" else None
    return palette is not None and palette.mode.endswith("A")


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Scale the transparent value of a PNG as Pillow scales the pixels."""
    value = image.info["transparency"]
    arguments = image.tile[0][3] if image.tile else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments or ""
    scale = _GREY_SCALES.get(raw_mode, 1)
    if isinstance(value, int) and value * scale <= 255:
        image.info["transparency"] = value * scale
    if isinstance(value, tuple) and max(value) > 255:
        image.info["transparency"] = tuple(part >> 8 for part in value)
