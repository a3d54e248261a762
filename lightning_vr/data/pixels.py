"""From an image to pixels: upright, square, on a background, of one size, in [-1, 1].

An image is rotated as its EXIF record says and cropped to its central square. What is transparent
is composited on a background, as a viewer shows it; what lies under the transparency is arbitrary.
Then the image is resized with the bicubic filter, which averages when it shrinks, and scaled from
8 bits (16 of grey images that have them) to ``[-1, 1]``.

==========  ====================================================================================
channels    of images with transparency; opaque ones have alpha 1
==========  ====================================================================================
1 (grey)    composited, then the luminance of ITU-R 601
3 (colour)  composited
4           colour and alpha. Averages weight colours by alpha, and what is wholly transparent
            has the colour of the background.
==========  ====================================================================================
"""

import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageColor
from torch import Tensor

from lightning_vr.data.image_formats import check_mode, grey_range, has_alpha, is_deep

Channels = Literal[1, 3, 4]
Colour = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

WHITE: Colour = (255, 255, 255)

_Plane = npt.NDArray[np.float32]
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def parse_colour(name: str, value: str | Sequence[int]) -> Colour:
    """Return red, green and blue from 0 to 255.

    Args:
        name: The argument.
        value: A colour by name, as ``"#rrggbb"`` or as three numbers.

    Raises:
        ValueError: If it is no opaque colour.
    """
    try:
        parts = ImageColor.getrgb(value) if isinstance(value, str) else value
        red, green, blue = (operator.index(part) for part in parts)
        if not all(0 <= part <= 255 for part in (red, green, blue)):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be the name of a colour, '#rrggbb' or three whole numbers from 0 to "
            f"255, got {value!r}: use one such as 'white' or [255, 255, 255]."
        ) from None
    return red, green, blue


def to_tensor(
    image: Image.Image, size: int, channels: Channels, background: Colour = WHITE
) -> Tensor:
    """Return an image as a sample, float32 of shape ``(channels, size, size)`` in ``[-1, 1]``.

    Args:
        image: The image, as ``to_pixels`` takes it.
        size: Side of the square result, in pixels.
        channels: 1 for grey, 3 for colour, 4 for colour and alpha.
        background: What transparent images are composited on.
    """
    return scaled(to_pixels(image, size, channels, background))


def scaled(pixels: Pixels) -> Tensor:
    """Return integers of 8 or 16 bits as float32, the smallest as -1 and the largest as 1."""
    half = np.iinfo(pixels.dtype).max / 2
    return torch.from_numpy(pixels.astype(np.float32)) / half - 1


def to_pixels(
    image: Image.Image, size: int, channels: Channels, background: Colour = WHITE
) -> Pixels:
    """Rotate, crop, composite and resize an image.

    Args:
        image: The first frame of an image file.
        size: Side of the square result, in pixels.
        channels: 1 for grey, 3 for colour, 4 for colour and alpha.
        background: What transparent images are composited on.

    Returns:
        Integers of shape ``(channels, size, size)``: of 16 bits if the image is grey with 16 bits,
        else of 8.

    Raises:
        UnsuitableImageError: If its pixels are numbers whose range is not known.
    """
    check_mode(image)
    image.load()  # a TIFF is turned here, and forgets its orientation
    if is_deep(image):
        return _deep_pixels(image, size, channels, background)

    square = _square(_upright(image))
    if channels == 4:
        pixels = _resized(_rgba(square), size)
    else:
        shown = _composited(square, background) if has_alpha(square) else square
        grey = shown.mode in ("1", "L")
        shown = shown if grey and channels == 1 else shown.convert("RGB")
        pixels = _resized(shown.convert("L" if channels == 1 else "RGB"), size)

    array = np.array(pixels, dtype=np.uint8).reshape(size, size, channels)
    if channels == 4:
        array[array[..., 3] == 0, :3] = background
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel of an image is transparent, in whole or in part."""
    if not has_alpha(image):
        return False
    image.load()
    if is_deep(image):
        return bool((np.asarray(image.convert("I")) == image.info["transparency"]).any())
    return int(np.asarray(_rgba(image))[..., 3].min()) < 255


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a broken record says nothing of the orientation
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, size: int) -> Image.Image:
    if image.width == size:
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _composited(image: Image.Image, background: Colour) -> Image.Image:
    behind = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(behind, _rgba(image)).convert("RGB")


def _deep_pixels(
    image: Image.Image, size: int, channels: Channels, background: Colour
) -> npt.NDArray[np.uint16]:
    """Return the pixels of a grey image of 16 bits, by the same steps."""
    black, white = grey_range(image)
    values = np.asarray(_square(_upright(image.convert("I"))), dtype=np.float32)
    grey = (values - black) / (white - black)
    seen = (values != image.info.get("transparency", -1)).astype(np.float32)

    shade = Image.new("RGB", (1, 1), background).convert("L" if channels == 1 else "RGB")
    behind = (np.asarray(shade).reshape(-1) / 255).tolist()
    if channels == 4:
        alpha = _resized_plane(seen, size)
        colour = _resized_plane(grey * seen, size) / np.where(alpha > 0, alpha, 1)
        planes = [np.where(alpha > 0, colour, part) for part in behind] + [alpha]
    else:
        planes = [_resized_plane(np.where(seen > 0, grey, part), size) for part in behind]
    deep: npt.NDArray[np.uint16] = np.rint(np.stack(planes).clip(0, 1) * 65535).astype(np.uint16)
    return deep


def _resized_plane(plane: npt.NDArray[Any], size: int) -> _Plane:
    resized = _resized(Image.fromarray(plane.astype(np.float32)), size)
    return np.asarray(resized).clip(0, 1)
