"""GradientVariance: how noisy the gradient is, and why, while a trainer runs.

The theory and its sources are in ``lightning_vr.variance.components``. Each measurement is unbiased
and noisy. Means over the latest are logged, older ones fading; a ratio is a ratio of means.
"""

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor

from lightning_vr.callbacks import gradient_variance_report as report
from lightning_vr.callbacks.cadence import Cadence
from lightning_vr.callbacks.curve_display import CurveDisplay
from lightning_vr.callbacks.given_training import GivenTraining
from lightning_vr.callbacks.gradient_probes import GradientProbe, trainable_names
from lightning_vr.callbacks.probe_choice import check_measurable, choose_probe
from lightning_vr.core.batches import is_plain
from lightning_vr.core.validation import check_at_least
from lightning_vr.lifecycle.curve_log import CurveLog
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.noisy_losses import Corruption
from lightning_vr.variance.components import PARTS, Components
from lightning_vr.variance.given_loss import LossFunction
from lightning_vr.variance.gradient_statistics import GradientStatistics

_MEMORY = 0.9
"""Factor on the weight of all earlier measurements at each new one."""

_STEPWISE_MEMORY = 0.99
"""The same where every optimizer step is a measurement."""

_MOST_PENDING = 1000
"""Steps whose measurements may stay on the device while nothing logs them."""


class GradientVariance(Callback):
    """Measures the variance of the gradient of one draw, and its parts.

    Logs ``gradient_variance/total``, ``squared_mean`` (of the mean gradient), ``signal_to_noise``
    and ``noise_scale`` (the number of draws at which the noise of the mean gradient is as large as
    the gradient). A batch of B independent draws has ``total / B``. Each measurement adds rows to
    ``gradient_variance.csv`` in the run's folder, for the whole and for each group of parameters.
    The end of ``fit`` leaves ``gradient_variance.png`` there, and a table in the terminal. Loggers
    that can show pictures or tables get both after each validation run. Callbacks can monitor each
    point, as ``gradient_variance/total/<group>`` or ``.../noise/s<noise level>``.

    Where times and noise can be drawn again it logs the components ``data``, ``timestep`` and
    ``noise`` as well. The file then has rows for bins of the noise level too, with the bin's
    fraction of ``E ‖g‖²`` as ``share``. This works on a ``DiffusionModule`` without arguments, and
    on any other module with its loss::

        Trainer(callbacks=[GradientVariance(loss=my_loss, schedule=VP())])

    On any module without a loss it takes no arguments and gives the totals: from the micro-batches
    of gradient accumulation and the ranks of DDP, at every step and free; without these from the
    training step of a copy of the module on both halves of a batch.

    Args:
        every_n_steps: Measure at one in this many optimizer steps. By default measuring takes about
            2 % of the training time.
        samples: Number of samples of a batch whose gradients are taken one by one, four draws each.
        noise_levels: Number of bins of the noise level, equally likely in training. They are
            measured all at once from per-sample gradients if there are two of ``samples`` for each,
            else in turn.
        loss: ``(module, x0, noise, t) -> loss of each sample (B,)`` of a module that is not a
            DiffusionModule. If it has a fifth argument, it gets the rows of ``Clean`` there, with
            ``group`` and ``cond``.
        schedule: The schedule that ``loss`` trains with, for the times of its draws.
        clean: A function from a batch of such a module to clean samples ``(B, *)``.
        draw: ``(x0, t, generator) -> corruption (B, *)``, which ``loss`` gets as ``noise``, such as
            the masks of a masked language model; standard normal noise if not given.
        timesteps: Density of t that ``loss`` trains with; that of ``schedule`` if not given, or
            uniform on (0, 1) without one.
        components: Names of the components, outermost first, such as ``("data", "mask rate", "mask
            pattern")``; those of the module if not given. Without a schedule, bins are bins of t
            and called by the second.

    Attributes:
        statistics: What was measured, from the start of training on.

    Raises:
        ValueError: If a number is out of range.
    """

    logged = ("gradient_variance/",)

    def __init__(
        self,
        every_n_steps: int | None = None,
        samples: int = 16,
        noise_levels: int = 8,
        loss: LossFunction | None = None,
        schedule: Schedule | None = None,
        clean: Any = None,
        draw: Corruption | None = None,
        timesteps: Density | None = None,
        components: Sequence[str] | None = None,
    ) -> None:
        check_at_least("samples", samples, 2)
        check_at_least("noise_levels", noise_levels, 1)
        report.check_parts(PARTS if components is None else components)
        self.cadence = Cadence(every_n_steps)
        self.samples, self.noise_levels = samples, noise_levels
        self.given = GivenTraining(loss, schedule, clean, draw, timesteps)
        self.components = None if components is None else tuple(components)
        self.statistics: GradientStatistics | None = None
        self._state: dict[str, Any] | None = None
        self._groups: list[str] = []
        self._measurements = 0
        self._restored_batch: Any = None
        self._is_prepared = False
        self._probe: GradientProbe | None = None
        self._pending: list[Components] = []
        self._display = CurveDisplay()
        self._curves: CurveLog | None = None
        self._logged_step = self._measured_step = -1
        self._has_unlogged = False

    @property
    def state_key(self) -> str:
        """Key that differs between instances that measure differently."""
        return self._generate_state_key(
            every_n_steps=self.cadence.every_n_steps,
            samples=self.samples,
            noise_levels=self.noise_levels,
            **self.given.key(),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the gradient cannot be measured with this trainer and module.

        Raises:
            MisconfigurationException: If gradients are not whole on each rank, the schedule of
                ``loss`` is missing, or it is unknown which gradient to measure.
        """
        if stage != "fit":
            return
        self._logged_step, self._measured_step, self._has_unlogged = -1, -1, False
        check_measurable(trainer, pl_module, self.given)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose how to measure, and open the file."""
        self._start(trainer, pl_module)
        self._display.open(trainer)
        assert self.statistics is not None
        self._curves = report.open_log(trainer, self.statistics, self._logged_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if a measurement is due, at the weights that the step begins with."""
        starts_step = batch_idx % trainer.accumulate_grad_batches == 0
        if not self._is_prepared:
            self._prepare(batch)
        assert self._probe is not None
        is_due = starts_step and self.cadence.is_due(trainer.global_step)
        if (is_due or batch_idx == 0) and self._probe.trainable != trainable_names(pl_module):
            rank_zero_info("GradientVariance starts again: other parameters are trained.")
            self._probe.close()
            self._start(trainer, pl_module)
            self._prepare(batch)
        self._probe.before_any_batch(batch)
        if not is_due:
            return
        found = self._probe.before_batch(batch, batch_idx, self._measurements)
        if found is None:
            return
        self.cadence.mark(trainer.global_step)
        assert self.statistics is not None
        whole, levels = found
        self.statistics.add(whole, _MEMORY)
        for level, components in levels.items():
            self.statistics.add_level(level, components, _MEMORY)
        self._measurements += 1
        self._log(trainer)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Note that the batch has a loss."""
        if self._probe is not None:
            self._probe.before_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Measure from micro-batches and ranks, and log at the loggers' cadence."""
        assert self._probe is not None
        found = self._probe.before_optimizer_step()
        if found is None or trainer.global_step == self._measured_step:
            return  # an error has ended the batch after this, and it is taken again
        self._measured_step = trainer.global_step
        self._pending.append(found)
        cadence = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if len(self._pending) > _MOST_PENDING:
            self._add_pending()
        if cadence and (trainer.global_step + 1) % cadence == 0:
            self._add_pending()
            self._log(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was measured in loggers that can show it."""
        self._add_pending()
        if self.statistics is None or self.statistics.is_empty:
            return
        if self._display.is_due(trainer):
            report.show(trainer, self.statistics, self._display.folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove hooks, and write what was measured."""
        self._add_pending()
        if self._probe is not None:
            self._probe.close()
        self._probe = None
        if self.statistics is None or self.statistics.is_empty:
            return
        if self._has_unlogged:
            # what a checkpoint counts as logged stays, as a run that goes on has no log event here
            report.log(trainer, self.statistics, self._curves)
        if trainer.is_global_zero:
            is_logged = self._display.is_new(trainer)
            report.show(trainer, self.statistics, self._display.folder, is_logged=is_logged)

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Remove hooks, and draw what was measured until then: a run may end by Ctrl-C."""
        if self._probe is not None:
            self._probe.close()
        found = self.statistics
        if found is not None and not found.is_empty and trainer.is_global_zero:
            report.show(trainer, found, self._display.folder, is_logged=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, or warn that there is none."""
        found = self.statistics
        if found is not None and trainer.is_global_zero:
            if found.is_empty:
                self.cadence.warn_of_none("GradientVariance", trainer.global_step)
            else:
                Console().print(report.table(found))

    def state_dict(self) -> dict[str, Any]:
        """Return the moments so far."""
        self._add_pending()
        state, groups = self._state, self._groups
        if self.statistics is not None:
            state, groups = self.statistics.state(), self.statistics.groups
        return {
            "statistics": state,
            "groups": groups,
            "measurements": self._measurements,
            "period": self.cadence.period,
            "measured_step": self._measured_step,
            "batch": self._pending_batch(),
            "logged_step": self._logged_step,
            "has_unlogged": self._has_unlogged,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the moments of a checkpoint."""
        self._state = state_dict["statistics"]
        self._groups = state_dict["groups"]
        self._measurements, self.cadence.period = state_dict["measurements"], state_dict["period"]
        self._measured_step = state_dict["measured_step"]
        self._restored_batch = state_dict["batch"]
        self._logged_step = state_dict["logged_step"]
        self._has_unlogged = state_dict["has_unlogged"]

    def _pending_batch(self) -> Any:
        """Return the batch that a measurement in the next step will use, if a file can hold it."""
        if self._probe is None or not self._is_prepared:
            return None
        if not self.cadence.is_due(self._probe.trainer.global_step):
            return None
        batch = self._probe.pending_batch()
        return move_data_to_device(batch, "cpu") if is_plain(batch) else None

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._is_prepared, self._pending = False, []
        bins = {"samples": self.samples, "noise_levels": self.noise_levels}
        probe = choose_probe(trainer, module, self.given, **bins)
        self._probe, state = probe, self._state if probe.names == self._groups else None
        if self._restored_batch is not None:
            probe.restore_pending_batch(self._restored_batch)
            self._restored_batch = None
        if self._state is not None and state is None:
            rank_zero_warn(
                f"GradientVariance: the checkpoint's moments are of the groups "
                f"{', '.join(map(str, self._groups))}, the module has {', '.join(probe.names)}: "
                f"they are dropped, and measuring starts anew."
            )
        own = module.variance_parts if isinstance(module, EstimatorModule) else PARTS
        parts = own if self.components is None else self.components
        axis = self.given.axis(parts[1])
        self.statistics = GradientStatistics(probe.names, probe.noise_levels, state, parts, axis)
        self._state = None

    def _prepare(self, batch: Any) -> None:
        assert self._probe is not None
        self._probe.prepare(batch)
        self.cadence.set_cost(self._probe.cost)
        self._is_prepared = True

    def _add_pending(self) -> None:
        pending, self._pending = self._pending, []
        self._has_unlogged |= bool(pending)
        for components in pending:
            assert self.statistics is not None
            self.statistics.add(components, _STEPWISE_MEMORY)

    def _log(self, trainer: Trainer) -> None:
        assert self.statistics is not None
        report.log(trainer, self.statistics, self._curves)
        self._logged_step, self._has_unlogged = trainer.global_step, False
