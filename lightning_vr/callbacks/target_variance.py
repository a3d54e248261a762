"""TargetVariance: how noisy the regression target is at each noise level, and what STF removes.

V_DSM, V_STF, ESS and D are measured on the training set once, when training starts (theory, units
and sources: ``lightning_vr.variance.target_measurement``). During training the variance that the
target removes is read off its weights: by the law of total variance the mean of
``tr Cov[x0 | x_t, S]`` is V_DSM - V_STF, and costs nothing.
"""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lightning_vr.callbacks import target_variance_report as report
from lightning_vr.callbacks.training_samples import training_samples
from lightning_vr.core.types import LossEstimate
from lightning_vr.core.validation import check_at_least
from lightning_vr.estimators.stf import STF
from lightning_vr.lifecycle.curve_log import CurveLog, log_rows, open_curve_log
from lightning_vr.lifecycle.loggers import log_numbers, run_folder
from lightning_vr.lifecycle.training_set import data_size, training_loader
from lightning_vr.process.diffusers_schedule import as_schedule
from lightning_vr.process.schedules import Schedule
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.removed_variance import RemovedVariance
from lightning_vr.variance.target_curves import TargetVarianceCurve
from lightning_vr.variance.target_measurement import measure_target_variance, noise_level_grid

log = logging.getLogger(__name__)

_COLUMNS = ("noise_level", "removed")
"""Columns of ``removed_variance.csv`` after ``step``."""

_DEFAULT_REFERENCES = (16, 256)
_TAIL = 1e-3
"""Fraction of training times on either side that the noise levels leave out."""


class TargetVariance(Callback):
    """Measures target variance against the noise level, for DSM and for STF.

    Curves over noise levels go to the run's folder: ``target_variance.csv`` and ``.png`` when
    training starts, ``removed_variance.csv`` with rows at each log event of the variance that the
    target has removed, as means over all draws so far. ``fit`` ends with a table in the terminal.

    Callbacks can monitor points, as ``target_variance/removed/s<noise level>``.

    On a ``DiffusionModule`` it needs no arguments; on any other module::

        Trainer(callbacks=[TargetVariance(schedule=VP(), clean=lambda batch: batch["image"])])

    Args:
        references: Numbers of references of STF to measure, besides the module's own. The default
            is 16 and 256, as far as there are as many samples.
        noise_levels: Number of noise levels. They span those of training, where curves change.
        samples: Number of noised samples for each noise level.
        max_data: Largest number of samples of the training set to measure on, evenly spaced. A part
            of the data has other curves than the whole.
        schedule: The schedule of a module that is not a DiffusionModule.
        clean: A function from a batch of such a module to clean samples ``(B, *)``, or to
            ``Clean`` with labels where the network is conditioned on classes.

    Attributes:
        curve: What was measured, from the start of training on.

    Raises:
        ValueError: If a number is out of range.
    """

    logged = ("target_variance/",)

    def __init__(
        self,
        references: list[int] | None = None,
        noise_levels: int = 20,
        samples: int = 1024,
        max_data: int = 10_000,
        schedule: Schedule | None = None,
        clean: Callable[[Any], Any] | None = None,
    ) -> None:
        check_at_least("noise_levels", noise_levels, 2)
        check_at_least("samples", samples, 64)
        check_at_least("max_data", max_data, 1)
        for count in references or []:
            check_at_least("references", count, 1)
        self.references = references
        self.noise_levels = noise_levels
        self.samples = samples
        self.max_data = max_data
        self.schedule = None if schedule is None else as_schedule(schedule)
        self.clean = clean
        self.curve: TargetVarianceCurve | None = None
        self._removed: RemovedVariance | None = None
        self._is_reported = False
        self._logged_step = -1
        self._data_size = 0
        self._folder = Path()
        self._curves: CurveLog | None = None

    @property
    def state_key(self) -> str:
        """Key that differs between instances that measure differently."""
        return self._generate_state_key(
            references=self.references,
            noise_levels=self.noise_levels,
            samples=self.samples,
            max_data=self.max_data,
            schedule=None if self.schedule is None else type(self.schedule).__name__,
            clean=getattr(self.clean, "__qualname__", None),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the schedule or the clean samples of the module are not known.

        Raises:
            MisconfigurationException: If ``schedule`` or ``clean`` is missing.
        """
        if stage != "fit":
            return
        missing = [name for name in ("schedule", "clean") if getattr(self, name) is None]
        if missing and not isinstance(pl_module, DiffusionModule):
            raise MisconfigurationException(
                f"TargetVariance needs `{'` and `'.join(missing)}` on a "
                f"{type(pl_module).__name__}: pass the schedule that it trains with and a function "
                f"from a batch to clean samples, as in TargetVariance(schedule=VP(), clean=...)."
            )
        self.curve, self._removed = None, None
        self._is_reported, self._logged_step = False, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, and move the sums of a checkpoint to the device, for the ranks to add."""
        self._folder = run_folder(trainer)
        self._curves = open_curve_log(trainer, "removed_variance", _COLUMNS, self._logged_step)
        if self._removed is not None:
            self._removed.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure, unless a checkpoint holds the curve, and report; the bank is filled by now."""
        # a run that resumes in the middle of an epoch has no start of an epoch
        if self._is_reported:
            return
        self._is_reported = True
        is_known = self._is_current(trainer, pl_module)
        if not is_known:
            self._measure(trainer, pl_module)
        if self.curve is None or self._removed is None:
            return
        self._removed.to(pl_module.device)
        if not is_known:
            points = report.numbers(self.curve.noise_levels, self.curve.columns())
            log_numbers(trainer, {}, points)
        if trainer.is_global_zero:
            report.write(trainer, self.curve, self._folder)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch's spread, and log the means at the loggers' cadence."""
        estimate = getattr(pl_module, "estimate", None)
        if self._removed is None or not isinstance(estimate, LossEstimate):
            return
        self._removed.add(estimate.noised.noise_level, estimate.target.spread)
        cadence = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = cadence and trainer.global_step % cadence == 0
        if is_due and self._logged_step != trainer.global_step:
            self._logged_step = trainer.global_step
            self._log(trainer, self._removed)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the last steps added."""
        if self._removed is not None and self._logged_step != trainer.global_step:
            # of a copy: a run that goes on from a checkpoint has no log event here
            self._log(trainer, copy.deepcopy(self._removed))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if self.curve is None or not trainer.is_global_zero:
            return
        shown, switch, note = max(self.curve.stf), 0.0, "V_STF is not what this run trains with."
        own = own_references(trainer, pl_module, self.curve.size)
        target = getattr(pl_module, "target", None)
        if own is not None and isinstance(target, STF):
            shown, switch, note = own, target.switch, ""
        Console().print(report.table(self.curve, shown, switch=switch, note=note))

    def state_dict(self) -> dict[str, Any]:
        """Return the curve and the sums over training so far."""
        return {
            "curve": None if self.curve is None else self.curve.state(),
            "removed": None if self._removed is None else self._removed.state(),
            "logged_step": self._logged_step,
            "data_size": self._data_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums, and the curve, so that a resumed run does not measure again."""
        if state_dict["curve"] is not None:
            self.curve = TargetVarianceCurve.from_state(state_dict["curve"])
            self._removed = RemovedVariance(self.curve.noise_levels, state_dict["removed"])
            self._data_size = state_dict["data_size"]
        self._logged_step = state_dict["logged_step"]

    def _is_current(self, trainer: Trainer, module: LightningModule) -> bool:
        """Return whether the curve of a checkpoint holds what the module trains with at present."""
        if self.curve is None:
            return False
        own = own_references(trainer, module, self.curve.size)
        size = data_size(training_loader(trainer))
        changes = []
        if self._data_size != size:
            changes.append(f"{self._data_size} training samples, there are {size} now")
        if own is not None and own not in self.curve.stf:
            changes.append(f"other references than {own}, which the module uses now")
        if changes and trainer.is_global_zero:
            log.warning(
                "TargetVariance: the checkpoint's curve is of %s: it is dropped and measured anew.",
                " and of ".join(changes),
            )
        return not changes

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        clean = training_samples(trainer, module, self.clean, self.max_data, "TargetVariance")
        if clean is None:
            return
        self._data_size = data_size(training_loader(trainer))
        size = len(clean.x0)
        counts = list(self.references or [n for n in _DEFAULT_REFERENCES if n <= size])
        own = own_references(trainer, module, size)
        counts += [own] if own is not None else []
        labels: Any = {"group": clean.group, "cond_group": clean.cond_group}
        low, high = self._training_noise_levels(module)
        self.curve = measure_target_variance(
            clean.x0,
            noise_level_grid(clean.x0, low, high, self.noise_levels, **labels),
            counts or [size],
            **labels,
            label_dropout=module.label_dropout if isinstance(module, DiffusionModule) else 0.0,
            samples=self.samples,
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )
        self._removed = RemovedVariance(self.curve.noise_levels)

    def _training_noise_levels(self, module: LightningModule) -> tuple[float, float]:
        if self.schedule is None and isinstance(module, DiffusionModule):
            schedule, timesteps, device = module.schedule, module.timesteps, module.device
        else:
            assert self.schedule is not None
            schedule, timesteps = self.schedule, self.schedule.default_timesteps()
            device = torch.device("cpu")
        tails = torch.tensor([_TAIL, 1 - _TAIL], device=device)
        levels = schedule.noise_level(timesteps.icdf(tails))
        return float(levels.min()), float(levels.max())

    def _log(self, trainer: Trainer, removed: RemovedVariance) -> None:
        levels, means = removed.noise_levels, removed.means()
        rows = torch.stack([levels, means], dim=1)[means.isfinite()]
        log_rows(trainer, self._curves, rows.tolist())
        log_numbers(trainer, {}, report.numbers(levels, {"removed": means}))


def own_references(trainer: Trainer, module: LightningModule, size: int) -> int | None:
    """Return how many of ``size`` samples the module's own STF uses as references, if it does."""
    target = getattr(module, "target", None)
    if not isinstance(target, STF):
        return None
    if target.references == "all":
        return size
    if target.references == "batch":
        return min(size, (training_loader(trainer).batch_size or 0) * trainer.world_size) or None
    return int(target.references) if int(target.references) <= size else None
