"""Reports of target variance: names for loggers, a CSV file, a picture, a table."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import (
    keeps_numbers,
    level_names,
    log_picture,
    training_goes_on,
)
from lightning_vr.variance.target_curves import MeasuredCurve, TargetVarianceCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_TABLE_ROWS = 9


def write(trainer: Trainer, curve: TargetVarianceCurve, folder: Path) -> None:
    """Write the file and the picture to the run's folder, and show them in loggers.

    Rank 0 alone calls it.
    """
    path = folder / "target_variance.png"
    with training_goes_on(trainer, "TargetVariance's report"):
        if keeps_numbers(trainer):
            write_csv(curve, folder / "target_variance.csv")
        draw(curve, path)
        found = columns(curve)
        rows = torch.stack(list(found.values()), dim=1).tolist()
        log_picture(trainer, "target_variance", path, (list(found), rows))


def numbers(
    noise_levels: Tensor, columns: Mapping[str, Tensor], prefix: str = "target_variance/"
) -> dict[str, float]:
    """Name numbers ``(L,)`` for monitors, ``target_variance/dsm/s0.5``; NaN is left out."""
    names = level_names(noise_levels)
    return {
        f"{prefix}{column}/s{name}": value
        for column, values in columns.items()
        for name, value in zip(names, values.tolist(), strict=True)
        if not math.isnan(value)
    }


def columns(curve: TargetVarianceCurve) -> dict[str, Tensor]:
    """Return every number ``(L,)`` by column, the factors V_DSM / V_STF included."""
    found = {"noise_level": curve.noise_levels, **curve.columns()}
    return found | {f"factor_{curve.name(n)}": curve.factor(n) for n in curve.stf}


def write_csv(curve: TargetVarianceCurve, path: Path) -> None:
    """Write one row for each noise level."""
    found = columns(curve)
    with replacing(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(found)
        writer.writerows(torch.stack(list(found.values()), dim=1).tolist())


@frees_figure
def draw(curve: TargetVarianceCurve, path: Path) -> None:
    """Draw V_DSM and every V_STF against the noise level, log-log, to a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    _draw_band(axes, curve, curve.dsm, "DSM", "black")
    shades = colormaps["viridis"](np.linspace(0.15, 0.85, len(curve.stf)))
    for shade, (n, variance) in zip(shades, curve.stf.items(), strict=True):
        is_zero = not bool(variance.mean.any())
        label = f"STF, n = {n}" + (" (all)" if n == curve.size else "") + (": 0" * is_zero)
        _draw_band(axes, curve, variance, label, shade)

    axes.set_xlabel("noise level  s = σ / α  (unit of the data)")
    axes.set_ylabel("target variance of the score  tr Cov / s⁴  (1 / unit²)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Target variance on {curve.size} samples, ± one standard error")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _draw_band(
    axes: "Axes", curve: TargetVarianceCurve, variance: MeasuredCurve, label: str, color: object
) -> None:
    levels = curve.noise_levels.numpy()
    mean = torch.where(variance.mean > 0, variance.mean, torch.nan).numpy()
    error = variance.error.numpy()
    # a band that reaches 0 would take the logarithmic axis with it
    lower = np.maximum(mean - error, mean / 3)
    axes.plot(levels, mean, "o-", markersize=3, color=color, label=label)
    axes.fill_between(levels, lower, mean + error, color=color, alpha=0.2, linewidth=0)


def table(
    curve: TargetVarianceCurve, references: int, *, switch: float = 0.0, note: str = ""
) -> "Table":
    """Return a table of some noise levels: V_DSM, V_STF, the factor between them, ESS.

    Args:
        curve: What was measured.
        references: The number of references to show.
        switch: Noise level below which STF is switched off.
        note: A line to put below it.
    """
    from rich.table import Table

    caption = f"V: ± one standard error, unit of the score at α = 1; {curve.size} samples. {note}"
    shown = Table(title="Target variance", caption=caption.strip(), caption_justify="left")
    name = "all" if references == curve.size else f"n = {references}"
    for header in ("noise level", "V_DSM", f"V_STF ({name})", "factor", "ESS"):
        shown.add_column(header, justify="right")

    last = len(curve.noise_levels) - 1
    rows = sorted({round(i * last / (_TABLE_ROWS - 1)) for i in range(_TABLE_ROWS)})
    names = level_names(curve.noise_levels)
    for i in rows:
        is_off = float(curve.noise_levels[i]) < switch
        shown.add_row(
            names[i], _with_error(curve.dsm, i), *_stf_cells(curve, references, i, is_off)
        )
    return shown


def _stf_cells(
    curve: TargetVarianceCurve, references: int, i: int, is_off: bool
) -> tuple[str, str, str]:
    if is_off:
        return _with_error(curve.dsm, i), "1 (off)", "1"
    ess = f"{float(curve.ess[references].mean[i]):.3g}"
    if references == curve.size:
        return "0 (exact)", "∞", ess
    return _with_error(curve.stf[references], i), f"{float(curve.factor(references)[i]):.3g}", ess


def _with_error(variance: MeasuredCurve, i: int) -> str:
    return f"{float(variance.mean[i]):.3g} ± {float(variance.error[i]):.1g}"
