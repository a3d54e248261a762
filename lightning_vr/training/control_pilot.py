"""Fitting a Taylor control variate while a module trains: coefficients, cost and gate.

A pilot measures on the batch of the step that is about to come, with draws of its own
(``control_measurement.py``). Before the first one, steps are timed with and without the control
variate. What that and the pilots take is a small share of the time of the run, half of which may be
spent in advance: early in training much changes.
"""

import math
import statistics
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.rng import preserve_global_rng, seed_global_rng
from lightning_vr.core.rows import detached
from lightning_vr.core.types import Clean
from lightning_vr.estimators.taylor.coefficients import Cost
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.lifecycle.loggers import level_names, log_numbers
from lightning_vr.training.control_measurement import ControlMeasurement
from lightning_vr.training.training_checks import check_derivatives, check_gradients

if TYPE_CHECKING:
    from lightning_vr.training.module import DiffusionModule

_SHARE, _OPEN_SHARE = 0.02, 0.05
"""Share of the time of training that fits may take, with the gate closed and with it open."""

_TIMING = 8
"""About how many steps it takes to time a control variate of order 0."""

_ADVANCE_STEPS = 10_000
"""Steps of a run whose share of fits may be spent in advance."""


class ControlPilot:
    """Fits a control variate while a module trains.

    Args:
        module: A module that is training with ``control``.
        control: Its control variate.
    """

    def __init__(self, module: "DiffusionModule", control: TaylorCV) -> None:
        self.module, self.control = module, control
        self.measurement = ControlMeasurement(module, control)
        self._is_checked = False

    def before_step(self, batch: Any) -> None:
        """Fit if it is time; all ranks must call it before each optimizer step."""
        step = self.module.global_step
        if self._is_checked and not self._is_due(step):
            return
        source = self.module.generator("control variate", "global", step)
        with preserve_global_rng():
            with seed_global_rng(source):
                clean = detached(self.module.clean(batch))
            if not self._is_checked:
                check_derivatives(self.module, clean)
                if not self.control.is_fixed:
                    check_gradients(self.module, clean)
                self._is_checked = True
                if self.control.pilot is None and not self.control.is_fixed:
                    self._say_if_too_short(self._first)
            if self._is_due(step) and not self._is_timed:
                self._time(step, batch, clean)
            if self._is_due(step):
                with seed_global_rng(source):  # whether checked and timed before or not
                    self._fit(step, clean)

    def _is_due(self, step: int) -> bool:
        """Return whether it is time to fit, or first to time what that takes."""
        control, pilot = self.control, self.control.pilot
        if control.is_fixed:
            return False
        return step >= (self._first if pilot is None else pilot["next"])

    @cached_property
    def _first(self) -> float:
        """The step from which on there is time to time steps."""
        return 0 if self.control.refit_every_n_steps else self._affordable_from(_TIMING)

    @property
    def _planned(self) -> float:
        return min(self.module.trainer.estimated_stepping_batches, _ADVANCE_STEPS)

    @property
    def _share(self) -> float:
        return _SHARE if self.control.is_closed else _OPEN_SHARE

    def _affordable_from(self, steps: float) -> float:
        """Return the step from which on fits may have taken the time of so many steps.

        Half of a run's share may be spent in advance.
        """
        return 2 * steps / self._share - self._planned

    @property
    def _is_timed(self) -> bool:
        """Whether all times are known that the gate and the next pilot need."""
        control, pilot = self.control, self.control.pilot
        if pilot is None or (control.gate == "auto" and control.fit.cost is None):
            return False
        return control.refit_every_n_steps is not None or pilot["seconds"] > 0

    def _time(self, step: int, batch: Any, clean: Clean) -> None:
        """Time steps, where anything depends on it, before the first fit."""
        control = self.control
        start = {"count": 0, "next": step, "spent": 0.0, "steps": 0.0, "seconds": 0.0}
        control.pilot = control.pilot or start
        if control.gate != "auto" and control.refit_every_n_steps is not None:
            return
        source = partial(self.module.generator, "control variate", "timing")
        encode = partial(self.module.clean, batch)
        cost, seconds, spent = self.measurement.cost(clean, encode, source)
        timing, expected = spent / seconds, 2 + control.parts * sum(cost)
        control.pilot |= {"spent": timing, "steps": expected, "seconds": seconds}
        if control.gate == "auto":
            control.fit.cost = Cost(cost.fixed + _OPEN_SHARE, cost.marginal)
        if control.refit_every_n_steps is None:
            due = math.ceil(self._affordable_from(timing + expected))
            control.pilot["next"] = max(step, due)
            self._say_if_too_short(due)

    def _say_if_too_short(self, first: float) -> None:
        """Say so if the first fit would come after the last step."""
        steps = self.module.trainer.estimated_stepping_batches
        if first >= steps:
            rank_zero_info(
                f"TaylorCV stays as it is: with {self._share:.0%} of their time {steps:.0f} steps "
                f"are too few to find out where it pays. Set `refit_every_n_steps` to find out."
            )

    def _fit(self, step: int, clean: Clean) -> None:
        control, fit, pilot = self.control, self.control.fit, self.control.pilot
        assert pilot is not None
        before = fit.is_open
        source = partial(self.module.generator, "control variate", step)
        if not fit.add(self.measurement.measure(clean, source)):
            rank_zero_info(f"TaylorCV at step {step}: gradients are not finite, and left out.")
        if pilot["count"] < 2 and pilot["seconds"]:
            pilot["steps"] = self._seconds(is_first=pilot["count"] == 0) / pilot["seconds"]
        self._schedule(step, pilot)
        log_numbers(self.module.trainer, gate_numbers(self.module, control))
        changed = pilot["count"] == 1 or not torch.equal(before, fit.is_open)
        if control.gate == "auto" and changed:
            rank_zero_info(f"TaylorCV at step {step}: {describe_gate(self.module, control)}")

    def _seconds(self, *, is_first: bool) -> float:
        """Return what a pilot takes, the same on all ranks: what the first compiles is no cost."""
        passes = self.measurement.seconds
        taken = len(passes) * statistics.median(passes) if is_first else sum(passes)
        return float(self.measurement.over_ranks(torch.tensor(taken, dtype=torch.float64)))

    def _schedule(self, step: int, pilot: dict[str, float]) -> None:
        """Say when the next pilot is due: soon at first, when much changes, and then evenly."""
        pilot["count"] += 1
        pilot["spent"] += pilot["steps"]
        if self.control.refit_every_n_steps is not None:
            pilot["next"] = step + self.control.refit_every_n_steps
            return
        evenly = 2 * pilot["steps"] / self._share
        soon = step + max(1, math.ceil(min(step, evenly)))
        pilot["next"] = max(soon, math.ceil(self._affordable_from(pilot["spent"] + pilot["steps"])))


def control_pilot(module: "DiffusionModule") -> ControlPilot | None:
    """Return a pilot for a module with a Taylor control variate, else None."""
    control = module.control_variate
    return ControlPilot(module, control) if isinstance(control, TaylorCV) else None


def gate_numbers(module: "DiffusionModule", control: TaylorCV) -> dict[str, float]:
    """Return what has been fitted as numbers for loggers."""
    fit, names = control.fit, level_names(_levels(module, control))
    found: dict[str, float] = {}
    if control.gate == "auto":
        found["control_variate/saving"] = fit.predicted_speedup
        found["control_variate/share"] = float(fit.shares[fit.is_open].sum())
    for b, name in enumerate(names):
        if control.gate == "auto":
            found[f"control_variate/open/s{name}"] = float(fit.is_open[b])
        found[f"control_variate/reduction/s{name}"] = float(fit.reductions[b])
        for part, beta in zip(("odd", "even"), fit.coefficients[b].tolist(), strict=False):
            found[f"control_variate/{part}/s{name}"] = beta
    return found


def describe_gate(module: "DiffusionModule", control: TaylorCV) -> str:
    """Return in which bins it is on, and why, as a sentence."""
    fit, names = control.fit, level_names(_levels(module, control))
    assert fit.cost is not None
    price = f"for all draws it makes a step {1 + sum(fit.cost):.2f} times as long"
    if control.is_closed:
        return (
            f"off in all {control.bins} bins of the noise level: {price}, and the best choice of "
            f"bins is predicted to train {fit.predicted_speedup:.2f} times as fast."
        )
    levels = ", ".join(name for name, is_open in zip(names, fit.is_open, strict=True) if is_open)
    return (
        f"on in {int(fit.is_open.sum())} of {control.bins} bins of the noise level, around s = "
        f"{levels}: {price}, and these bins are predicted to train {fit.predicted_speedup:.2f} "
        f"times as fast."
    )


def _levels(module: "DiffusionModule", control: TaylorCV) -> Tensor:
    """Return the noise level in the middle of each bin ``(bins,)``."""
    middle = (torch.arange(control.bins, dtype=torch.float64) + 0.5) / control.bins
    t = module.timesteps.icdf(middle.to(module.device, widest_float(module.device)))
    return module.schedule.noise_level(t).cpu()
