"""GradientSignal: do noise levels pull together, and how large should a batch be?

The theory and its sources are in ``lightning_vr.variance.level_gradients`` and
``lightning_vr.variance.signal_statistics``.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console

from lightning_vr.callbacks import gradient_signal_report as report
from lightning_vr.callbacks.cadence import Cadence
from lightning_vr.callbacks.curve_display import CurveDisplay
from lightning_vr.callbacks.given_training import GivenTraining
from lightning_vr.callbacks.gradient_probes import trainable_names
from lightning_vr.callbacks.noisy_training import NoisyTraining, noisy_training
from lightning_vr.callbacks.probe_choice import check_strategy
from lightning_vr.core.batches import batch_size
from lightning_vr.core.distributed import broadcast, least, rank
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.validation import check_at_least
from lightning_vr.lifecycle.curve_log import CurveLog
from lightning_vr.lifecycle.precision import loss_scale
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import Corruption
from lightning_vr.variance.given_loss import LossFunction
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.level_gradients import level_products
from lightning_vr.variance.signal_statistics import SignalStatistics

_COST = 1.6
"""Cost of the gradients of two halves of a batch over a training step, as measured on a U-Net."""

_MEMORY = 0.99
"""Factor on the weight of all earlier measurements at each new one: nearly equal weights."""


class GradientSignal(Callback):
    """Measures the signal of the gradient: mean gradients in bins of the noise level.

    It tells whether noise levels pull against each other, by the cosines of their mean gradients
    (negative transfer), and at which batch size the noise of the gradient is as large as the
    gradient, for all times and for each bin. ``GradientVariance`` tells what the noise consists of.

    Both halves of a batch are measured in each bin: that costs about one and a half training steps
    for each bin and for all times. A half counts as a batch of its own, with strata and drawn
    references of its size. Only trained parameters count: those of an adapter, where one is
    trained.

    Each measurement adds rows to ``gradient_signal.csv`` in the run's folder. The end of ``fit``
    leaves a map of the cosines there, ``gradient_signal.png``, and prints noise scales, what other
    batch sizes would change, and the clearest conflict, if one is resolved. Loggers get
    ``gradient_signal/noise_scale`` and ``gradient_signal/squared_mean``; callbacks can monitor each
    point, as ``gradient_signal/noise_scale/s<noise level>`` and
    ``gradient_signal/cosine/s<one>/s<other>``.

    Args:
        every_n_steps: Measure at one in this many optimizer steps. By default measuring takes about
            2 % of the training time.
        noise_levels: Number of bins of the noise level, equally likely in training.
        loss: ``(module, x0, noise, t) -> loss of each sample (B,)`` of a module that is not a
            DiffusionModule. If it has a fifth argument, it gets the rows of ``Clean`` there, with
            ``group`` and ``cond``.
        schedule: The schedule that ``loss`` trains with, for the times of its draws.
        clean: A function from a batch of such a module to clean samples ``(B, *)``.
        draw: ``(x0, t, generator) -> corruption (B, *)``, which ``loss`` gets as ``noise``;
            standard normal noise if not given.
        timesteps: Density of t that ``loss`` trains with; that of ``schedule`` if not given, or
            uniform on (0, 1) without one.

    Attributes:
        statistics: What was measured, from the start of training on.

    Raises:
        ValueError: If a number is out of range.
    """

    logged = ("gradient_signal/",)

    def __init__(
        self,
        every_n_steps: int | None = None,
        noise_levels: int = 8,
        loss: LossFunction | None = None,
        schedule: Schedule | None = None,
        clean: Callable[[Any], Any] | None = None,
        draw: Corruption | None = None,
        timesteps: Density | None = None,
    ) -> None:
        check_at_least("noise_levels", noise_levels, 1)
        self.cadence = Cadence(every_n_steps)
        self.noise_levels = noise_levels
        self.given = GivenTraining(loss, schedule, clean, draw, timesteps)
        self.statistics: SignalStatistics | None = None
        self._state: Any = None
        self._trainable: list[str] = []
        self._seed = 0
        self._batch = 0
        self._training: NoisyTraining | None = None
        self._measurement: GradientMeasurement | None = None
        self._display = CurveDisplay()
        self._curves: CurveLog | None = None
        self._logged_step = -1

    @property
    def state_key(self) -> str:
        """Key that differs between instances that measure differently."""
        return self._generate_state_key(
            every_n_steps=self.cadence.every_n_steps,
            noise_levels=self.noise_levels,
            **self.given.key(),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the signal cannot be measured with this trainer and module.

        Raises:
            MisconfigurationException: If gradients are not whole on each rank, or it is unknown how
                to draw the noise of the loss again.
        """
        if stage != "fit":
            return
        self._logged_step = -1
        check_strategy(trainer, "GradientSignal")
        self.given.check("GradientSignal")
        if self.given.loss is None and not isinstance(pl_module, DiffusionModule):
            raise MisconfigurationException(
                f"GradientSignal needs the loss of a {type(pl_module).__name__} at given times: "
                f"pass it, as in GradientSignal(loss=..., schedule=VP()), a function (module, x0, "
                f"noise, t) -> loss of each sample."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare to measure, and open the file."""
        seed = getattr(pl_module, "run_seed", torch.initial_seed() % 2**63)
        # ranks that were not seeded alike must sketch alike
        self._seed = int(broadcast(torch.tensor(seed, device=pl_module.device)))
        self.cadence.set_cost(_COST * (self.noise_levels + 1))
        self._start(trainer, pl_module)
        self._display.open(trainer)
        self._curves = report.open_log(trainer, self._logged_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if a measurement is due, at the weights that the step begins with.

        Raises:
            MisconfigurationException: If the first batch has only one sample on a rank.
        """
        if batch_idx == 0 and trainer.current_epoch == 0 and batch_size(batch) < 2:
            raise MisconfigurationException(
                "GradientSignal needs two samples in a batch, got a batch of 1: use a larger batch."
            )
        starts_step = batch_idx % trainer.accumulate_grad_batches == 0
        if not starts_step or not self.cadence.is_due(trainer.global_step):
            return
        half = least(batch_size(batch)) // 2
        if half == 0:
            return
        if self._trainable != trainable_names(pl_module):
            rank_zero_info("GradientSignal starts again: other parameters are trained.")
            self._start(trainer, pl_module)
        self.cadence.mark(trainer.global_step)
        self._batch = batch_size(batch) * trainer.accumulate_grad_batches * trainer.world_size
        self._measure(trainer, batch, half)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was measured in loggers that can show it."""
        if self.statistics is None or self.statistics.is_empty:
            return
        if self._display.is_due(trainer):
            report.show(trainer, self.statistics, self._display.folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        self._training = self._measurement = None
        if self.statistics is None or self.statistics.is_empty or not trainer.is_global_zero:
            return
        is_logged = self._display.is_new(trainer)
        report.show(trainer, self.statistics, self._display.folder, is_logged=is_logged)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Draw what was measured until then: a run may end by Ctrl-C."""
        if self.statistics is None or self.statistics.is_empty or not trainer.is_global_zero:
            return
        report.show(trainer, self.statistics, self._display.folder, is_logged=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print tables and sentences, or warn that there is nothing to tell."""
        if self.statistics is None or not trainer.is_global_zero:
            return
        if self.statistics.is_empty:
            self.cadence.warn_of_none("GradientSignal", trainer.global_step)
        else:
            report.tell(Console(), self.statistics, self._batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments so far."""
        statistics = self._state if self.statistics is None else self.statistics.state()
        return {
            "statistics": statistics,
            "trainable": self._trainable,
            "period": self.cadence.period,
            "batch": self._batch,
            "logged_step": self._logged_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the moments of a checkpoint."""
        self._state, self._trainable = state_dict["statistics"], state_dict["trainable"]
        self.cadence.period, self._batch = state_dict["period"], state_dict["batch"]
        self._logged_step = state_dict["logged_step"]

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        training = noisy_training(trainer, module, self.given, self.noise_levels)
        assert training is not None, "setup has refused a module without a loss"
        groups = parameter_groups(module)[1]
        self._measurement = GradientMeasurement(training.loss, self._source(trainer), groups)
        names, state = trainable_names(module), self._state
        if state is not None and self._trainable != names:
            rank_zero_warn(
                "GradientSignal: the checkpoint's moments are of other parameters than are trained "
                "now: they are dropped, and measuring starts anew."
            )
            state = None
        self._training, self._trainable, self._state = training, names, None
        axis = self.given.axis("time")
        self.statistics = SignalStatistics(training.noise_levels, axis, state)

    def _measure(self, trainer: Trainer, batch: Any, half: int) -> None:
        assert self._training is not None
        assert self._measurement is not None
        assert self.statistics is not None
        measurement = self._measurement
        clean = self._training.encode(batch, measurement.source("encode"))
        halves = [clean.rows(slice(i * half, (i + 1) * half)) for i in range(2)]
        measurement.loss_scale = loss_scale(trainer)
        shared = self._source(trainer, own=False)
        products, variances = level_products(measurement, halves, self.noise_levels, shared)
        if bool(products.isfinite().all() & variances.isfinite().all()):
            self.statistics.add(products, variances, _MEMORY)
            report.log(trainer, self.statistics, self._curves)
            self._logged_step = trainer.global_step

    def _source(self, trainer: Trainer, *, own: bool = True) -> Callable[..., torch.Generator]:
        """Return what gives generators of this run, step and key, and of each rank its own."""

        def source(*key: int | str) -> torch.Generator:
            key = (self._seed, rank() if own else -1, "gradient signal", trainer.global_step, *key)
            return generator(*key, device=trainer.lightning_module.device)

        return source
