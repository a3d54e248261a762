"""SampleGrid: pictures of samples of the model, from the same noise each time."""

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_vr.callbacks.after_validation import AfterValidation, SampleFunction
from lightning_vr.callbacks.pictures import is_picture, picture_shape_message, save_picture
from lightning_vr.core.rng import generator, preserve_global_rng
from lightning_vr.core.validation import check_at_least
from lightning_vr.data.conditions import ConditionsSource
from lightning_vr.lifecycle.loggers import log_picture, run_folder, training_goes_on
from lightning_vr.lifecycle.training_set import data_size, held_out_loader
from lightning_vr.training.module import DiffusionModule


class SampleGrid(AfterValidation):
    """Writes samples as a picture after validation, to ``samples/`` in the run's folder.

    Images make a grid: one row per prompt or other condition, else one column per class if there
    are classes. Points in the plane make a scatter plot. The noise is the same each time, so that
    pictures can be compared. Loggers that can show pictures get them too.

    Args:
        samples: Number of samples.
        every_n_validations: Write a picture after every n-th validation run of a fit.
        sample: A function ``(module, count) -> samples`` for modules that are no DiffusionModule;
            images in [-1, 1].
        conditions: What samples are conditioned on: a file of prompts or labels, or its columns;
            what the first validation samples have if not given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SampleGrid(samples=64)], logger=False)
    """

    def __init__(
        self,
        samples: int = 100,
        every_n_validations: int = 1,
        sample: SampleFunction | None = None,
        conditions: ConditionsSource | None = None,
    ) -> None:
        super().__init__(sample, every_n_validations, conditions)
        check_at_least("samples", samples, 1)
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
        """Raise if samples cannot be drawn as a picture, once their shape is known."""
        if (
            self._is_checked
            or self.sample is not None
            or not isinstance(pl_module, DiffusionModule)
        ):
            return
        self._is_checked = True
        context = trainer.precision_plugin.forward_context()
        with torch.no_grad(), preserve_global_rng(), context:
            clean = pl_module.clean(batch).rows(slice(1))
            source = generator(pl_module.run_seed, "shape", device=pl_module.device)
            one = pl_module.sample(1, group=clean.group, cond=clean.cond, source=source)
            shape = pl_module.decode(one).shape[1:]
        if not is_picture(tuple(shape)):
            raise MisconfigurationException(picture_shape_message(tuple(shape)))

    def evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        """Generate the samples and write their picture."""
        stage = trainer.state.fn or TrainerFn.FITTING
        is_fit = stage == TrainerFn.FITTING
        name = f"step_{trainer.global_step:08d}" if is_fit else stage.value
        path = run_folder(trainer) / "samples" / f"{name}.png"
        each = self._samples_of_each(module)
        count = self.samples if each is None else self.samples // each * each
        samples = self.generate(module, count, "grid", each=each or 1)
        if trainer.is_global_zero:
            with training_goes_on(trainer, f"The samples {path}"):
                save_picture(samples, path, columns=each or _columns(module, count))
                log_picture(trainer, "samples", path)

    def _samples_of_each(self, module: LightningModule) -> int | None:
        """Return the number of samples of each condition, a row of the grid, if there are any."""
        if self.conditions is not None:
            count = len(self.conditions)
        elif self.sample is None and isinstance(module, DiffusionModule):
            if self.asked(module, torch.tensor([0])).cond is None:
                return None
            count = data_size(held_out_loader(module.trainer))
        else:
            return None
        return self.samples // min(count, math.isqrt(self.samples))


def _columns(module: LightningModule, count: int) -> int | None:
    """Return the number of classes, for a column each, if there is a sample of each class."""
    classes = getattr(module, "num_classes", None)
    return classes if classes and classes <= count else None
