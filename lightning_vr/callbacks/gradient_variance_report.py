"""Reports of gradient variance: names for loggers, rows of a file, a picture, a table."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.lifecycle.curve_log import CurveLog, log_rows, open_curve_log
from lightning_vr.lifecycle.loggers import (
    level_names,
    log_numbers,
    log_picture,
    training_goes_on,
)
from lightning_vr.variance.components import PARTS, Components
from lightning_vr.variance.gradient_statistics import NOISE_LEVEL, GradientStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


_RESERVED = {"step", "of", "name", "total", "squared_mean", "share", "whole", "group"}
"""Names of columns and rows of their own, which no part may have."""


def columns(parts: Sequence[str]) -> list[str]:
    """Return the columns of ``gradient_variance.csv`` after ``step``."""
    names = (*_keys(parts), "total", "squared_mean")
    return ["of", "name", *(name + e for name in names for e in ("", "_error")), "share"]


def check_parts(parts: Sequence[str]) -> None:
    """Raise if there are not three names of parts that loggers and files take.

    Raises:
        ValueError: If there are more or fewer, two are alike, or one has other signs.
    """
    names = _keys([parts] if isinstance(parts, str) else parts)
    are_plain = all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) for name in names)
    if len(set(names)) != 3 or len(names) != 3 or not are_plain or _RESERVED & set(names):
        raise ValueError(
            f"`components` must be three different names of letters, digits and spaces, got "
            f"{parts!r}: use the parts of the noise, outermost first, such as {PARTS}."
        )


def open_log(trainer: Trainer, statistics: GradientStatistics, logged_step: int) -> CurveLog:
    """Return the file; all ranks call it. ``logged_step`` is that of ``open_curve_log``."""
    return open_curve_log(trainer, "gradient_variance", columns(statistics.parts), logged_step)


def log(trainer: Trainer, statistics: GradientStatistics, curves: CurveLog | None) -> None:
    """Send a few numbers to loggers, and all of them to the file and to what callbacks monitor."""
    log_numbers(trainer, numbers(statistics), points(statistics))
    log_rows(trainer, curves, rows(statistics))


def show(
    trainer: Trainer, statistics: GradientStatistics, folder: Path, *, is_logged: bool = True
) -> None:
    """Draw the picture in the run's folder, and show it and a table in loggers; on rank 0 alone."""
    path = folder / "gradient_variance.png"
    with training_goes_on(trainer, "GradientVariance's report"):
        draw(statistics, path)
        if is_logged:
            shown = columns(statistics.parts), rows(statistics)
            log_picture(trainer, "gradient_variance", path, shown)


def numbers(statistics: GradientStatistics) -> dict[str, float]:
    """Return what is known of the whole gradient by name, such as ``gradient_variance/total``."""
    whole = statistics.whole
    names = (*_keys(statistics.parts), "total", "squared_mean")
    found = {name: float(values[0]) for name, values in zip(names, whole, strict=True)}
    found["signal_to_noise"] = float(whole.signal_to_noise[0])
    found["noise_scale"] = float(whole.noise_scale[0])
    return _named(found)


def points(statistics: GradientStatistics) -> dict[str, float]:
    """Return what is known of groups and noise levels, such as ``gradient_variance/noise/s0.5``."""
    found: dict[str, float] = {}
    for i, group in enumerate(statistics.groups, start=1):
        found[f"total/{group}"] = float(statistics.whole.total[i])
    levels, fractions = statistics.levels, statistics.fractions
    parts = (*_keys(statistics.parts), "total")
    letter = "s" if statistics.axis == NOISE_LEVEL else "t"
    for i, name in enumerate(level_names(statistics.noise_levels)):
        for part, values in zip(parts, levels, strict=False):
            found[f"{part}/{letter}{name}"] = float(values[i])
        found[f"share/{letter}{name}"] = float(fractions[i])
    return _named(found)


def _keys(parts: Sequence[str]) -> list[str]:
    """Return parts as names that loggers and files take."""
    return [part.replace(" ", "_") for part in parts]


def _named(numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"gradient_variance/{k}": v for k, v in numbers.items() if math.isfinite(v)}


def rows(statistics: GradientStatistics) -> list[list[float | str]]:
    """Return a row of ``COLUMNS`` for the whole, each group and each noise level."""
    found: list[list[float | str]] = []
    for kind, name, values, errors, share in _rows(statistics):
        pairs = zip(values, errors, strict=True)
        found.append([kind, name, *(number for pair in pairs for number in pair), share])
    return found


@frees_figure
def draw(statistics: GradientStatistics, path: Path) -> None:
    """Draw the components of the whole, of each group and, where measured, by noise level."""
    from matplotlib.figure import Figure

    has_levels = not bool(statistics.levels.total.isnan().all())
    figure = Figure(figsize=(11 if has_levels else 6, 4.5), layout="constrained")
    left = figure.add_subplot(1, 2 if has_levels else 1, 1)
    draw_components(left, statistics.whole, ["all", *statistics.groups], parts=statistics.parts)
    left.set_ylabel("gradient variance of one draw  tr Cov(g)")
    left.set_title("by group of parameters")
    if has_levels:
        right = figure.add_subplot(1, 2, 2)
        names = level_names(statistics.noise_levels)
        errors, parts = statistics.levels_error, statistics.parts
        draw_components(right, statistics.levels, names, errors, parts)
        right.set_xlabel(f"{axis_label(statistics.axis)}, in the middle of equally likely bins")
        right.set_title(f"by {statistics.axis}")
    save_figure(figure, path)


def table(statistics: GradientStatistics) -> "Table":
    """Return a table of the whole and of each noise level, of each group where no level is known.

    Columns of which nothing is known are left out.
    """
    from rich.table import Table

    caption = (
        f"Variance of the gradient of one draw, ± one standard error. Noise scale: "
        f"{_noise_scale(statistics, 0)}, the batch size at which the gradient is as large as its "
        f"noise."
    )
    has_levels = not bool(statistics.levels.total.isnan().all())
    lines = [
        {statistics.axis if has_levels else "parameters": name} | cells
        for kind, name, cells in _table_cells(statistics)
        if cells["total"] and kind != ("group" if has_levels else statistics.axis)
    ]
    headers = [header for header in lines[0] if any(line[header] for line in lines)]
    shown = Table(title="Gradient variance", caption=caption, caption_justify="left")
    for number, header in enumerate(headers):
        shown.add_column(header, justify="right" if number else "left")
    for line in lines:
        shown.add_row(*(line[header] for header in headers))
    return shown


def _table_cells(statistics: GradientStatistics) -> Iterator[tuple[str, str, dict[str, str]]]:
    for i, (kind, name, values, errors, share) in enumerate(_rows(statistics)):
        cells = {"total": with_error(values[3], errors[3])}
        for part, value in zip(statistics.parts, values, strict=False):
            cells[f"{part} %"] = _percent(value / values[3]) if values[3] else ""
        cells["share %"] = _percent(share)
        if bool(statistics.levels.total.isnan().all()):
            cells["noise scale"] = "" if kind == statistics.axis else _noise_scale(statistics, i)
        yield kind, name, cells


def _percent(fraction: float) -> str:
    return "" if math.isnan(fraction) else f"{100 * fraction:.0f}"


def _noise_scale(statistics: GradientStatistics, i: int) -> str:
    scale = float(statistics.whole.noise_scale[i])
    return f"{scale:.3g} draws" if math.isfinite(scale) else "above what was measured"


def _rows(
    statistics: GradientStatistics,
) -> Iterator[tuple[str, str, list[float], list[float], float]]:
    kinds = ["whole", *["group"] * len(statistics.groups)]
    names = ["all", *statistics.groups]
    for i, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        yield kind, name, _at(statistics.whole, i), _at(statistics.whole_error, i), math.nan
    fractions = statistics.fractions.tolist()
    for i, name in enumerate(level_names(statistics.noise_levels)):
        values, errors = _at(statistics.levels, i), _at(statistics.levels_error, i)
        yield statistics.axis, name, values, errors, fractions[i]


def _at(components: Components, i: int) -> list[float]:
    return [float(values[i]) for values in components]


def with_error(value: float | Tensor, error: float | Tensor) -> str:
    """Return a number and its standard error as text, "" for one that is not known."""
    if math.isnan(value):
        return ""
    text = f"{float(value):.3g}"
    return text if math.isnan(error) else f"{text} ± {float(error):.1g}"


def axis_label(axis: str) -> str:
    """Return what stands at an axis of noise levels, or of times without a schedule."""
    return f"{axis}  s = σ / α" if axis == NOISE_LEVEL else f"{axis}  t"


def draw_components(
    axes: "Axes",
    components: Components,
    names: list[str],
    error: Components | None = None,
    parts: Sequence[str] = PARTS,
) -> None:
    """Stack the parts, or show the total alone where the parts are unknown."""
    at = np.arange(len(names))
    if bool(components.noise.isnan().all()):
        axes.bar(at, components.total.numpy(), color="tab:grey", label="total")
    else:
        base = np.zeros(len(names))
        for i, color in ((2, "tab:red"), (1, "tab:orange"), (0, "tab:blue")):
            height = np.nan_to_num(components[i].numpy().clip(min=0))
            axes.bar(at, height, bottom=base, color=color, label=parts[i])
            base += height
    if error is not None:
        total, width = components.total.numpy(), error.total.numpy()
        axes.errorbar(at, total, width, fmt="none", ecolor="black", capsize=2)
    axes.set_xticks(at, names, rotation=45, ha="right")
    axes.grid(which="major", axis="y", alpha=0.3)
    axes.legend()
