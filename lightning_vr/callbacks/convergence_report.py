"""Reports of ``Convergence``: rows of its file, numbers for loggers, and the picture."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.variance.convergence_curves import Floors, LossCurves, Record, loss_curves
from lightning_vr.variance.convergence_summary import summarize
from lightning_vr.variance.target_curves import MeasuredCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "noise_level",
    *(name + suffix for name in LossCurves._fields for suffix in ("", "_error")),
)
"""Columns of ``convergence.csv`` after ``step``."""

_COLOURS = {
    "loss": "black",
    "floor": "tab:gray",
    "excess": "tab:red",
    "held_out": "tab:blue",
    "held_out_floor_high": "tab:cyan",
}
_LABELS = {
    "loss": "training loss",
    "floor": "its floor",
    "excess": "distance from the optimum",
    "held_out": "held-out loss",
    "held_out_floor_high": "held-out loss of the training set's optimum",
}


def rows(floors: Floors, record: Record) -> list[list[float]]:
    """Return a row of ``COLUMNS`` for each noise level; what was not measured is NaN."""
    found = loss_curves(floors, record).columns()
    unknown = torch.full_like(floors.noise_levels, math.nan)
    columns = [found.get(name, unknown) for name in COLUMNS[1:]]
    table: list[list[float]] = torch.stack([floors.noise_levels, *columns], dim=1).tolist()
    return table


def numbers(floors: Floors, record: Record) -> dict[str, float]:
    """Return the means over all noise levels by name, such as ``convergence/excess``."""
    found = loss_curves(floors, record, in_all=True)
    names = ("loss", "floor", "excess", "held_out")
    curves = {name: getattr(found, name) for name in names if getattr(found, name) is not None}
    values = {f"convergence/{name}": float(curve.mean) for name, curve in curves.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def points(floors: Floors, record: Record) -> dict[str, Tensor]:
    """Return the curves that callbacks may monitor at each noise level."""
    found = loss_curves(floors, record)
    curves = {name: getattr(found, name) for name in ("loss", "floor", "excess", "held_out")}
    return {name: curve.mean for name, curve in curves.items() if curve is not None}


@frees_figure
def draw(floors: Floors, records: list[Record], path: Path) -> None:
    """Draw the last validation against the noise level, and the run against the step, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    by_level, over_run = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    _draw_levels(by_level, floors, loss_curves(floors, records[-1]))
    _draw_run(over_run, floors, records)
    figure.suptitle("\n".join(textwrap.wrap(summarize(floors, records), 125)), fontsize=10)
    save_figure(figure, path)


def _draw_levels(axes: "Axes", floors: Floors, curves: LossCurves) -> None:
    levels = floors.noise_levels
    axes.set(xscale="log", yscale="log", xlabel="noise level  s = σ / α  (unit of the data)")
    axes.set(ylabel="loss per dimension", ylim=_limits(curves))
    axes.xaxis.set_major_formatter("{x:g}")
    for name, colour in _COLOURS.items():
        curve = getattr(curves, name)
        if curve is not None and bool(curve.mean.isfinite().any()):
            style = "--" if "floor" in name else "o-"
            axes.plot(levels, curve.mean, style, markersize=3, color=colour, label=_LABELS[name])
    for name in ("floor", "excess", "held_out"):
        if getattr(curves, name) is not None:
            _draw_band(axes, levels, curves, name)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")


def _draw_band(axes: "Axes", levels: Tensor, curves: LossCurves, name: str) -> None:
    """Draw a standard error on either side of the bounds of a curve, or of the curve itself."""
    low, high = (getattr(curves, f"{name}_{end}", getattr(curves, name)) for end in ("low", "high"))
    lower, upper = low.mean - low.error, high.mean + high.error
    if bool(lower.isfinite().all()) and bool(upper.isfinite().all()):
        lower = lower.clamp(min=1e-12)
        axes.fill_between(levels, lower, upper, color=_COLOURS[name], alpha=0.2, linewidth=0)


def _draw_run(axes: "Axes", floors: Floors, records: list[Record]) -> None:
    steps = [record.step for record in records]
    curves = [loss_curves(floors, record, in_all=True) for record in records]
    axes.set(xlabel="optimizer steps", ylabel="loss per dimension, all noise levels", yscale="log")
    for name in ("loss", "floor", "excess", "held_out"):
        found = [getattr(each, name) for each in curves]
        if any(curve is None or bool(curve.mean.isnan()) for curve in found):
            continue
        mean, error = (torch.cat(part) for part in zip(*found, strict=True))
        style = "--" if name == "floor" else "o-"
        axes.plot(steps, mean, style, markersize=3, color=_COLOURS[name], label=_LABELS[name])
        low = (mean - error).clamp(min=1e-12)
        axes.fill_between(steps, low, mean + error, color=_COLOURS[name], alpha=0.2, linewidth=0)
    axes.grid(which="major", alpha=0.3)


def _limits(curves: LossCurves) -> tuple[float, float]:
    """Return limits of a logarithmic axis: three decades below the largest loss, or all of them."""
    shown: list[MeasuredCurve] = [x for x in (curves.loss, curves.held_out) if x is not None]
    most = max(float(curve.mean.nan_to_num(0).max()) for curve in shown) or 1.0
    least = min(float(curve.mean.nan_to_num(math.inf).min()) for curve in shown)
    return max(min(least, 1e-3 * most), 1e-6 * most), 2 * most
