"""Samples as pictures: images in a grid, points in the plane as a scatter plot."""

import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import torch
from PIL import Image
from torch import Tensor

from lightning_vr.lifecycle.atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALLEST_TILE = 40

_Arguments = ParamSpec("_Arguments")


def frees_figure(draw: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Let a function that draws a matplotlib figure free its memory when it returns.

    A figure is about 4000 objects in circles, a megabyte. Python looks for such circles only once
    there are a quarter more objects than before: memory would grow by tens of megabytes between.
    """

    @functools.wraps(draw)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        was_enabled = gc.isenabled()
        gc.disable()  # so that all of the figure is in the youngest generation, a quick search
        try:
            draw(*args, **kwargs)
        finally:
            gc.collect(0)
            if was_enabled:
                gc.enable()

    return call


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure to a PNG, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def save_picture(samples: Tensor, path: Path, columns: int | None = None) -> None:
    """Write images ``(B, C, H, W)`` in [-1, 1] as a grid, points ``(B, 2)`` as a scatter plot.

    Args:
        samples: Images with 1 or 3 channels, or points in the plane.
        path: The PNG to write; its folder is made.
        columns: Number of columns of the grid; the grid is square if not given.

    Raises:
        ValueError: If samples are neither images nor points.
    """
    samples = samples.detach().float().cpu()
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        grid = _grid(samples, columns or math.ceil(math.sqrt(len(samples))))
        with replacing(path) as file:
            grid.save(file, format="png")
    elif samples.ndim == 2 and samples.shape[1] == 2:
        _scatter(samples, path)
    else:
        raise ValueError(picture_shape_message(tuple(samples.shape[1:])))


def is_picture(shape: tuple[int, ...]) -> bool:
    """Return whether ``save_picture`` can draw samples of ``shape``."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or shape == (2,)


def picture_shape_message(shape: tuple[int, ...]) -> str:
    """Return the error message for samples of a ``shape`` that ``save_picture`` cannot draw."""
    return (
        f"Samples must be images (1 or 3, H, W) or points (2,), got {shape}: override `decode` to "
        f"turn them into pictures, or leave SampleGrid out."
    )


def _grid(images: Tensor, columns: int) -> Image.Image:
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    tiles = images.new_ones(rows * columns, channels, height + 1, width + 1)
    tiles[:count, :, :height, :width] = images.clamp(-1, 1)

    wall = tiles.reshape(rows, columns, channels, height + 1, width + 1)
    wall = wall.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)
    pixels = ((wall + 1) * 127.5).round().to(torch.uint8).squeeze(-1).numpy()
    picture = Image.fromarray(pixels)
    scale = max(1, _SMALLEST_TILE // max(height, width))
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST)


@frees_figure
def _scatter(points: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=4, linewidths=0, alpha=0.6)
    axes.set_aspect("equal")
    axes.set_xlabel("x₁")  # mathematics between dollars is parsed anew, and kept, for each figure
    axes.set_ylabel("x₂")
    axes.set_title(f"{len(points)} samples")
    save_figure(figure, path)
