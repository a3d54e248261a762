"""SampleGrid: what the model draws, the same noise at every look, as pictures."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor

from lightning_vr.callbacks.after_validation import AfterValidation, SampleFunction
from lightning_vr.module import DiffusionModule
from lightning_vr.rng import undisturbed
from lightning_vr.sinks import log_picture, run_folder, training_goes_on

_SMALLEST_TILE = 40


class SampleGrid(AfterValidation):
    """Writes samples as a picture after validation, to ``samples/`` in the run's folder.

    Images make a grid, one column per class if there are classes; points in the plane make a
    scatter plot. The noise is the same each time, so that one sees samples grow. Loggers that can
    show pictures get them too.

    Args:
        samples: How many.
        every_n_validations: Draw after every n-th validation run of a fit.
        sample: A function ``(module, count) -> samples`` for modules that are no DiffusionModule;
            images in [-1, 1].

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SampleGrid(samples=64)], logger=False)
    """

    def __init__(
        self,
        samples: int = 100,
        every_n_validations: int = 1,
        sample: SampleFunction | None = None,
    ) -> None:
        super().__init__(sample, every_n_validations)
        if samples < 1:
            raise ValueError(f"Argument `samples` expected to be at least 1, but got {samples}.")
        self.samples = samples
        self._is_checked = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Refuse samples that make no picture, once their shape is known."""
        if (
            self._is_checked
            or self.sample is not None
            or not isinstance(pl_module, DiffusionModule)
        ):
            return
        self._is_checked = True
        with torch.no_grad(), undisturbed():
            shape = self.draw(pl_module, 1, "shape").shape[1:]
        if not is_picture(tuple(shape)):
            raise MisconfigurationException(_no_picture(tuple(shape)))

    def measure(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the samples and write their picture."""
        stage = trainer.state.fn or TrainerFn.FITTING
        is_fit = stage == TrainerFn.FITTING
        name = f"step_{trainer.global_step:08d}" if is_fit else stage.value
        path = run_folder(trainer) / "samples" / f"{name}.png"
        samples = self.draw(module, self.samples, "grid")
        if trainer.is_global_zero:
            with training_goes_on(trainer, f"The samples {path}"):
                save_picture(samples, path, columns=_columns(module, len(samples)))
                log_picture(trainer, "samples", path)


def _columns(module: LightningModule, count: int) -> int | None:
    """Return the number of classes, so that each has a column, if there is a sample of each."""
    classes = getattr(module, "num_classes", None)
    return classes if classes and classes <= count else None


def save_picture(samples: Tensor, path: Path, columns: int | None = None) -> None:
    """Write images ``(B, C, H, W)`` in [-1, 1] as a grid, points ``(B, 2)`` as a scatter plot.

    Args:
        samples: Images with 1 or 3 channels, or points in the plane.
        path: The PNG to write; its folder is made.
        columns: Number of columns of the grid; a square if not given.

    Raises:
        ValueError: If samples are neither.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = samples.detach().float().cpu()
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        _grid(samples, columns or math.ceil(math.sqrt(len(samples)))).save(path)
    elif samples.ndim == 2 and samples.shape[1] == 2:
        _scatter(samples, path)
    else:
        raise ValueError(_no_picture(tuple(samples.shape[1:])))


def _no_picture(shape: tuple[int, ...]) -> str:
    return (
        f"Samples expected to be images (1 or 3, H, W) or points (2,), but got {shape}: override "
        f"`decode` to turn them into pictures, or leave SampleGrid out."
    )


def is_picture(shape: tuple[int, ...]) -> bool:
    """Return whether samples of ``shape`` are what ``save_picture`` can draw."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or shape == (2,)


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


def _scatter(points: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=4, linewidths=0, alpha=0.6)
    axes.set_aspect("equal")
    axes.set_xlabel("$x_1$")
    axes.set_ylabel("$x_2$")
    axes.set_title(f"{len(points)} samples")
    figure.savefig(path, dpi=120)
