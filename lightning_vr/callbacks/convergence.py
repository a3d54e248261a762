"""Convergence: how far a network is from its optimum at each noise level, in any run.

The measurement and its theory are in ``lightning_vr.variance.convergence``, the irreducible part of
the loss in ``lightning_vr.variance.optimum``.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lightning_vr.callbacks import convergence_report as report
from lightning_vr.callbacks.cadence import TIME_BUDGET
from lightning_vr.callbacks.convergence_losses import MeasuredLoss, measured_loss
from lightning_vr.callbacks.convergence_samples import held_out_samples, train_samples
from lightning_vr.callbacks.curve_display import CurveDisplay
from lightning_vr.callbacks.target_variance_report import numbers as numbers_by_level
from lightning_vr.callbacks.training_samples import training_samples
from lightning_vr.core.batches import batch_size
from lightning_vr.core.distributed import world_size
from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.core.validation import check_at_least
from lightning_vr.lifecycle.curve_log import CurveLog, log_rows, open_curve_log
from lightning_vr.lifecycle.loggers import log_numbers, log_picture, training_goes_on
from lightning_vr.lifecycle.training_set import data_size, training_loader
from lightning_vr.lifecycle.weight_averaging import averaged_weights
from lightning_vr.process.diffusers_schedule import as_schedule
from lightning_vr.process.sampling import evaluating
from lightning_vr.process.schedules import Schedule
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.convergence import ConvergenceMeasurement
from lightning_vr.variance.convergence_curves import Record, records_from, records_state
from lightning_vr.variance.convergence_monitor import whole_blocks
from lightning_vr.variance.convergence_summary import summarize
from lightning_vr.variance.fixed_draws import BLOCKS, FixedDraws, LevelTimes
from lightning_vr.variance.given_loss import LossFunction
from lightning_vr.variance.optimum import Population

log = logging.getLogger(__name__)

_PASSES = 2.5
"""Passes of a measurement, each with its noising and loss, that cost a training step of a sample.

A backward pass is two forward ones, but a pass of a measurement costs more than one of training:
2.85 were measured on a small U-Net (``tests/benchmarks/test_convergence_cost.py``).
"""


class Convergence(Callback):
    """Says at which noise levels a network has learned what there is to learn.

    At fixed draws of the training set and of the validation set, the same throughout a run, it
    measures the plain loss at each noise level, its floor (the irreducible part, exact over the
    training set or bracketed from a part of it) and the distance from the optimum, with standard
    errors. The fit ends with a few sentences: where the loss is at its floor, where what is left
    lies, whether it still falls, and since when the held-out gap opens.

    The optimum is that of the encoded training set as read once, with the labels that the network
    sees: at low noise it reproduces training samples, and a network that generalises stays away
    from it. Where held-out data are denoised better than by it, the sentences say so.

    ``convergence.csv`` in the run's folder has a row for each noise level at each validation,
    ``convergence.png`` the last of them and the curves over the run. Loggers get
    ``convergence/loss``, ``floor``, ``excess`` (the distance) and ``held_out``, means over equally
    likely noise levels, and the picture after each validation run. Callbacks can monitor points, as
    ``convergence/excess/s<noise level>``. Averages of ``EMA`` are measured.

    On a ``DiffusionModule`` it needs no arguments; on any other module::

        Trainer(callbacks=[Convergence(loss=my_loss, schedule=VP())])

    Args:
        every_n_steps: Measure before the first of this many optimizer steps, and at the end. By
            default measuring takes about 2 % of the training time.
        noise_levels: Number of equally likely bins of the noise level.
        samples: Number of draws at each of them, for each set; a multiple of 16 is used.
        max_data: Largest number of training samples that the optimum is computed from, evenly
            spaced; with fewer than all, floor and distance are brackets.
        loss: ``(module, x0, noise, t) -> squared error of each sample (B,)``, whatever its weight
            and what the network predicts, of a module that is not a DiffusionModule. If it has a
            fifth argument, it gets the rows of ``Clean`` there, with ``group`` and ``cond``, and
            the optimum is that of a network that sees them.
        schedule: The schedule that ``loss`` trains with.
        clean: A function from a batch of such a module to clean samples ``(B, *)``, or a ``Clean``.

    Attributes:
        records: The validations so far.

    Raises:
        ValueError: If a number is out of range.
    """

    logged = ("convergence/",)

    def __init__(
        self,
        every_n_steps: int | None = None,
        noise_levels: int = 12,
        samples: int = 128,
        max_data: int = 10_000,
        loss: LossFunction | None = None,
        schedule: Schedule | None = None,
        clean: Callable[[Any], Any] | None = None,
    ) -> None:
        if every_n_steps is not None:
            check_at_least("every_n_steps", every_n_steps, 1)
        check_at_least("noise_levels", noise_levels, 2)
        check_at_least("samples", samples, BLOCKS)
        check_at_least("max_data", max_data, 2)
        self.every_n_steps, self.noise_levels = every_n_steps, noise_levels
        self.samples, self.max_data = samples, max_data
        self.loss, self.clean = loss, clean
        self.schedule = None if schedule is None else as_schedule(schedule)
        self.records: list[Record] = []
        self._data_size = 0
        self._every = 1
        self._loss: MeasuredLoss | None = None
        self._measurement: ConvergenceMeasurement | None = None
        self._final: list[Record] = []
        self._display = CurveDisplay()
        self._curves: CurveLog | None = None

    @property
    def state_key(self) -> str:
        """Key that differs between instances that measure differently."""
        return self._generate_state_key(
            noise_levels=self.noise_levels,
            samples=self.samples,
            max_data=self.max_data,
            loss=getattr(self.loss, "__qualname__", None),
            schedule=None if self.schedule is None else type(self.schedule).__name__,
            clean=getattr(self.clean, "__qualname__", None),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the loss of the module is not known.

        Raises:
            MisconfigurationException: If ``loss`` or ``schedule`` is missing.
        """
        if stage != "fit":
            return
        given = [name for name in ("loss", "schedule", "clean") if getattr(self, name) is not None]
        missing = [name for name in ("loss", "schedule") if name not in given]
        if missing and (given or not isinstance(pl_module, DiffusionModule)):
            raise MisconfigurationException(
                f"Convergence needs `{'` and `'.join(missing)}` on a {type(pl_module).__name__}: "
                f"pass a function (module, x0, noise, t) -> squared error of each sample, and the "
                f"schedule that it trains with, as in Convergence(loss=..., schedule=VP())."
            )
        # a second fit of the same trainer goes on
        self.records = self.records + self._final if trainer.global_step > 0 else []
        self._final = []
        self._loss = self._measurement = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        self._display.open(trainer)
        logged_step = self.records[-1].step if self.records else -1
        self._curves = open_curve_log(trainer, "convergence", report.COLUMNS, logged_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is due, at the weights that the step begins with."""
        if self._measurement is None:
            self._prepare(trainer, pl_module, batch)
        starts_step = batch_idx % trainer.accumulate_grad_batches == 0
        step, last = trainer.global_step, self.records[-1].step if self.records else -1
        # a step of manual optimization may count as several: none may stand for its period
        if starts_step and step // self._every > last // self._every:
            self.records.append(self._measured(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was measured in loggers that can show it."""
        if self.records and self._display.is_due(trainer):
            self._show(trainer, self.records, is_logged=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once more, and draw the picture."""
        if self._measurement is None:
            return
        if not self.records or self.records[-1].step < trainer.global_step:
            # a run that goes on from a checkpoint of this moment does not measure here
            self._final = [self._measured(trainer, pl_module)]
        if trainer.is_global_zero:
            is_logged = self._display.is_new(trainer)
            self._show(trainer, self.records + self._final, is_logged=is_logged)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the sentences."""
        if self._measurement is not None and trainer.is_global_zero:
            Console().print(f"Convergence: {self.summary()}", highlight=False)

    def summary(self) -> str:
        """Return what was found, in sentences."""
        if self._measurement is None:
            return "Nothing has been measured yet."
        return summarize(self._measurement.floors, self.records + self._final)

    def state_dict(self) -> dict[str, Any]:
        """Return the validations so far."""
        return records_state(self.records) | {"data_size": self._data_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the validations of a checkpoint."""
        self.records = records_from(state_dict)
        self._data_size = state_dict["data_size"]

    @torch.no_grad()
    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Compute the optimum at the draws; the bank of a target is filled by now."""
        self._loss = found = measured_loss(trainer, module, self.loss, self.schedule, self.clean)
        rows = batch_size(batch)
        times = LevelTimes.stratified(
            found.schedule, found.timesteps, self.noise_levels, whole_blocks(self.samples)
        )
        train = train_samples(trainer, module, found.clean, self.samples)
        held_out = held_out_samples(trainer, module, found.clean, self.samples)
        others = (
            None if held_out is None else FixedDraws("held-out", held_out, times, found.schedule)
        )
        size = data_size(training_loader(trainer))
        clean = None if self.loss is None else found.clean
        references = training_samples(trainer, module, clean, self.max_data, "Convergence")
        with preserve_global_rng(), evaluating(module):
            self._measurement = ConvergenceMeasurement(
                FixedDraws("train", train, times, found.schedule),
                others,
                None if references is None else Population.prepare(references, size),
                found.losses,
                rows,
                module.device,
                found.scale,
            )
        step = rows * trainer.accumulate_grad_batches * world_size()
        cost = self._measurement.evaluations / (_PASSES * step)
        self._every = self.every_n_steps or math.ceil(cost / TIME_BUDGET)
        self._drop_if_of_others(trainer, size, has_held_out=others is not None)

    def _drop_if_of_others(self, trainer: Trainer, size: int, *, has_held_out: bool) -> None:
        """Start anew if the checkpoint's validations are of other data."""
        is_same = not self.records or (
            self._data_size == size and has_held_out == (self.records[-1].held_out is not None)
        )
        if not is_same:
            self.records = []
            if trainer.is_global_zero:
                log.warning(
                    "Convergence: the checkpoint's validations are of other data: they are dropped."
                )
        self._data_size = size

    @torch.no_grad()
    def _measured(self, trainer: Trainer, module: LightningModule) -> Record:
        """Measure the weights that count, on all ranks, and log what was found."""
        assert self._measurement is not None
        assert self._loss is not None
        with averaged_weights(trainer, module), evaluating(module), preserve_global_rng():
            record = self._measurement.measure(trainer.global_step, self._loss.losses)
        floors = self._measurement.floors
        log_rows(trainer, self._curves, report.rows(floors, record))
        curves = numbers_by_level(
            floors.noise_levels, report.points(floors, record), "convergence/"
        )
        log_numbers(trainer, report.numbers(floors, record), curves)
        return record

    def _show(self, trainer: Trainer, records: list[Record], *, is_logged: bool) -> None:
        """Draw the picture in the run's folder, and show it and a table in loggers; on rank 0."""
        assert self._measurement is not None
        floors, path = self._measurement.floors, self._display.folder / "convergence.png"
        with training_goes_on(trainer, "The picture of the convergence"):
            report.draw(floors, records, path)
            if is_logged:
                table = (report.COLUMNS, report.rows(floors, records[-1]))
                log_picture(trainer, "convergence", path, table)
