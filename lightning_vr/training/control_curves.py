"""What the pilots of a Taylor control variate have found, as numbers, as a file and as a table.

Loggers get ``control_variate/reduction``, the fraction of ``E‖g‖²`` of a step that it is predicted
to remove in the bins where it runs, and with ``gate="auto"`` also ``control_variate/saving``, the
predicted factor on training time, and ``control_variate/share``, the fraction of draws in open
bins. Where there is a logger, ``control_variate.csv`` in the run's folder has a row for each pilot
and bin; loggers that show tables get that of the 1st, 2nd, 4th, 8th ... pilot. Callbacks can
monitor single points, such as ``control_variate/odd/s<noise level>``.
"""

import torch
from torch import Tensor

from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.lifecycle.curve_log import CurveLog
from lightning_vr.lifecycle.loggers import level_names
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.diffusion import Diffusion

_PARTS = ("odd", "even")


class ControlCurves:
    """Logs what a control variate has learned.

    Args:
        model: A model that is training with ``control``.
        control: Its control variate.
        run: The run that it trains in.
    """

    def __init__(self, model: Diffusion, control: TaylorCV, run: RunContext) -> None:
        self.model, self.control, self.run = model, control, run
        self._file: CurveLog | None = None

    def log(self, step: int) -> None:
        """Log what the pilot of a step has found; all ranks call it."""
        pilot = self.control.pilot
        assert pilot is not None
        if self._file is None:
            logged = int(pilot.get("logged_step", -1))
            self._file = self.run.open_curve_log("control_variate", self._columns, logged)
        pilot["logged_step"] = step
        rows = self.rows()
        self.run.log(self.numbers(), self.points(rows))
        self.run.log_rows(self._file, rows)
        count = int(pilot["count"])
        if count & (count - 1) == 0:
            self.run.log_table("control_variate", self._columns, rows)

    def numbers(self) -> dict[str, float]:
        """Return what is predicted of all bins, by name."""
        fit, is_open = self.control.fit, self._is_open
        found = {"reduction": float(fit.reductions[is_open].sum())}
        if self.control.gate == "auto":
            found["saving"] = fit.predicted_speedup
            found["share"] = float(fit.fractions[is_open].sum())
        return {f"control_variate/{name}": value for name, value in found.items()}

    def points(self, rows: list[list[float]]) -> dict[str, float]:
        """Return what ``rows`` has, by name."""
        names = level_names(self._noise_levels)
        return {
            f"control_variate/{column}/s{name}": value
            for name, (_, *values) in zip(names, rows, strict=True)
            for column, value in zip(self._columns[1:], values, strict=True)
        }

    def rows(self) -> list[list[float]]:
        """Return a row for each bin."""
        fit = self.control.fit
        coefficients = fit.coefficients.expand(-1, self.control.parts)
        columns = (self._noise_levels, self._is_open, fit.reductions, *coefficients.unbind(dim=1))
        found: list[list[float]] = torch.stack([x.double().cpu() for x in columns], dim=1).tolist()
        return found

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("noise_level", "open", "reduction", *_PARTS[: self.control.parts])

    @property
    def _noise_levels(self) -> Tensor:
        return self.model.objective.noise_levels(self.control.bins)

    @property
    def _is_open(self) -> Tensor:
        """In which bins it runs ``(bins,)``; a gate between two noise levels may cut a bin."""
        gate = self.control.gate
        if gate == "auto":
            return self.control.fit.is_open
        levels = self._noise_levels.cpu()
        low, high = (0.0, torch.inf) if gate == "open" else gate
        return (levels >= low) & (levels <= high)
