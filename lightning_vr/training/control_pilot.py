"""Fitting a Taylor control variate while a model trains: coefficients, cost and gate.

A pilot measures on the batch of the next step, with draws of its own (``control_measurement.py``).
Before the first pilot, steps are timed with and without the control variate. Timing and pilots may
take a small fraction of the time of the run, and half of it in advance, as much changes early in
training.
"""

import math
import statistics
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_vr.core.rng import preserve_global_rng, seed_global_rng
from lightning_vr.core.rows import detached
from lightning_vr.core.types import Clean
from lightning_vr.estimators.taylor.coefficients import Cost
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.lifecycle.loggers import level_names
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.control_curves import ControlCurves
from lightning_vr.training.control_measurement import ControlMeasurement
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.training_checks import check_derivatives, check_gradients

_TIME_BUDGET, _OPEN_TIME_BUDGET = 0.02, 0.05
"""Fraction of training time that fits may take, with the gate closed and with it open."""

_TIMING_STEPS = 8
"""Training time, in steps, of timing a control variate of order 0."""

_ADVANCE_STEPS = 10_000
"""Steps of a run whose time budget may be spent in advance."""


class ControlPilot:
    """Fits a control variate while a model trains.

    Args:
        model: A model that is training with ``control``.
        control: Its control variate.
        run: The run that it trains in.
    """

    def __init__(self, model: Diffusion, control: TaylorCV, run: RunContext) -> None:
        self.model, self.control, self.run = model, control, run
        self.measurement = ControlMeasurement(model, control, run)
        self._curves = ControlCurves(model, control, run)
        self._is_checked = False

    def before_step(self, batch: Any) -> None:
        """Fit if it is time; all ranks must call it before each optimizer step."""
        step = self.run.step()
        if self._is_checked and not self._is_due(step):
            return
        source = self.model.generator("control variate", "global", step)
        with preserve_global_rng():
            with seed_global_rng(source):
                clean = detached(self.model.clean(batch))
            if not self._is_checked:
                check_derivatives(self.model, self.run, clean)
                if not self.control.is_fixed:
                    check_gradients(self.model, self.run, clean)
                self._is_checked = True
                if self.control.pilot is None and not self.control.is_fixed:
                    self._report_if_too_short(self._first)
            if self._is_due(step) and not self._is_timed:
                self._time(step, batch, clean)
            if self._is_due(step):
                with seed_global_rng(source):  # the same draws whether checks came before or not
                    self._fit(step, clean)

    def _is_due(self, step: int) -> bool:
        """Return whether it is time to fit, or to time steps before the first fit."""
        control, pilot = self.control, self.control.pilot
        if control.is_fixed:
            return False
        return step >= (self._first if pilot is None else pilot["next"])

    @cached_property
    def _first(self) -> float:
        """The first step at which the time budget allows to time steps."""
        return 0 if self.control.refit_every_n_steps else self._affordable_from(_TIMING_STEPS)

    @property
    def _planned(self) -> float:
        return min(self.run.planned_steps(), _ADVANCE_STEPS)

    @property
    def _time_budget(self) -> float:
        return _TIME_BUDGET if self.control.is_closed else _OPEN_TIME_BUDGET

    def _affordable_from(self, steps: float) -> float:
        """Return the first step at which fits may have taken the time of ``steps`` steps.

        Half of the run's time budget may be spent in advance.
        """
        return 2 * steps / self._time_budget - self._planned

    @property
    def _is_timed(self) -> bool:
        """Whether the times that the gate and the next pilot need are known."""
        control, pilot = self.control, self.control.pilot
        if pilot is None or (control.gate == "auto" and control.fit.cost is None):
            return False
        return control.refit_every_n_steps is not None or pilot["seconds"] > 0

    def _time(self, step: int, batch: Any, clean: Clean) -> None:
        """Time steps before the first fit, if the gate or the cadence depends on it."""
        control = self.control
        start = {"count": 0, "next": step, "spent": 0.0, "steps": 0.0, "seconds": 0.0}
        control.pilot = control.pilot or start
        if control.gate != "auto" and control.refit_every_n_steps is not None:
            return
        source = partial(self.model.generator, "control variate", "timing")
        encode = partial(self.model.clean, batch)
        cost, seconds, spent = self.measurement.cost(clean, encode, source)
        timing, expected = spent / seconds, 2 + control.parts * sum(cost)
        control.pilot |= {"spent": timing, "steps": expected, "seconds": seconds}
        if control.gate == "auto":
            control.fit.cost = Cost(cost.fixed + _OPEN_TIME_BUDGET, cost.marginal)
        if control.refit_every_n_steps is None:
            due = math.ceil(self._affordable_from(timing + expected))
            control.pilot["next"] = max(step, due)
            self._report_if_too_short(due)

    def _report_if_too_short(self, first: float) -> None:
        """Tell the user if the first fit would come after the last step."""
        steps = self.run.planned_steps()
        if first >= steps:
            rank_zero_info(
                f"TaylorCV is not fitted: {self._time_budget:.0%} of the time of {steps:.0f} steps "
                f"is too little to measure where it pays. Set `refit_every_n_steps` to measure it."
            )

    def _fit(self, step: int, clean: Clean) -> None:
        control, fit, pilot = self.control, self.control.fit, self.control.pilot
        assert pilot is not None
        before = fit.is_open
        source = partial(self.model.generator, "control variate", step)
        if not fit.add(self.measurement.measure(clean, source)):
            rank_zero_info(f"TaylorCV at step {step}: gradients are not finite and are left out.")
        if pilot["count"] < 2 and pilot["seconds"]:
            pilot["steps"] = self._seconds(is_first=pilot["count"] == 0) / pilot["seconds"]
        self._schedule(step, pilot)
        self._curves.log(step)
        changed = pilot["count"] == 1 or not torch.equal(before, fit.is_open)
        if control.gate == "auto" and changed:
            rank_zero_info(f"TaylorCV at step {step}: {describe_gate(self.model, control)}")

    def _seconds(self, *, is_first: bool) -> float:
        """Return the seconds of a pilot, the same on all ranks, without the first's compilation."""
        passes = self.measurement.seconds
        taken = len(passes) * statistics.median(passes) if is_first else sum(passes)
        return float(self.measurement.over_ranks(torch.tensor(taken, dtype=torch.float64)))

    def _schedule(self, step: int, pilot: dict[str, float]) -> None:
        """Set the step of the next pilot: soon at first, while much changes, then evenly."""
        pilot["count"] += 1
        pilot["spent"] += pilot["steps"]
        if self.control.refit_every_n_steps is not None:
            pilot["next"] = step + self.control.refit_every_n_steps
            return
        evenly = 2 * pilot["steps"] / self._time_budget
        soon = step + max(1, math.ceil(min(step, evenly)))
        pilot["next"] = max(soon, math.ceil(self._affordable_from(pilot["spent"] + pilot["steps"])))


def control_pilot(model: Diffusion, run: RunContext) -> ControlPilot | None:
    """Return a pilot for a model with a Taylor control variate, else None."""
    control = model.control_variate
    return ControlPilot(model, control, run) if isinstance(control, TaylorCV) else None


def describe_gate(model: Diffusion, control: TaylorCV) -> str:
    """Return in which bins the control variate is on, and why, as a sentence."""
    fit, names = control.fit, level_names(model.objective.noise_levels(control.bins))
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
