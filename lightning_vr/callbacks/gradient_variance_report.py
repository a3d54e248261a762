"""Reports of gradient variance: names for loggers, a CSV file, a picture, a table."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer

from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import level_names, log_picture, run_folder, training_goes_on
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_statistics import GradientStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

PARTS = ("data", "timestep", "noise")
"""The components that sum to the total, outermost first."""


def write(trainer: Trainer, statistics: GradientStatistics) -> None:
    """Write the file and the picture to the run's folder, if there is anything to write.

    All ranks must call it.
    """
    folder = run_folder(trainer)
    if statistics.is_empty or not trainer.is_global_zero:
        return
    with training_goes_on(trainer, "GradientVariance's report"):
        write_csv(statistics, folder / "gradient_variance.csv")
        draw(statistics, folder / "gradient_variance.png")
        log_picture(trainer, "gradient_variance", folder / "gradient_variance.png")


def numbers(statistics: GradientStatistics) -> dict[str, float]:
    """Name numbers as loggers take them, ``gradient_variance/noise/s0.5``; NaN is left out."""
    whole = statistics.whole
    found = {name: float(getattr(whole, name)[0]) for name in Components._fields}
    found["signal_to_noise"] = float(whole.signal_to_noise[0])
    found["noise_scale"] = float(whole.noise_scale[0])
    for i, group in enumerate(statistics.groups, start=1):
        found[f"total/{group}"] = float(whole.total[i])
    levels, fractions = statistics.levels, statistics.fractions
    for i, name in enumerate(level_names(statistics.noise_levels)):
        for part in (*PARTS, "total"):
            found[f"{part}/s{name}"] = float(getattr(levels, part)[i])
        found[f"share/s{name}"] = float(fractions[i])
    return {f"gradient_variance/{k}": v for k, v in found.items() if math.isfinite(v)}


def write_csv(statistics: GradientStatistics, path: Path) -> None:
    """Write one row for the whole, each group and each noise level, standard errors included."""
    with replacing(path, "w", newline="") as file:
        writer = csv.writer(file)
        fields = Components._fields
        writer.writerow(["of", "name", *(name + e for name in fields for e in ("", "_error"))])
        for kind, name, values, errors in _rows(statistics):
            pairs = zip(values, errors, strict=True)
            writer.writerow([kind, name, *(number for pair in pairs for number in pair)])


@frees_figure
def draw(statistics: GradientStatistics, path: Path) -> None:
    """Draw the components of the whole, of each group and, where measured, by noise level."""
    from matplotlib.figure import Figure

    has_levels = not bool(statistics.levels.total.isnan().all())
    figure = Figure(figsize=(11 if has_levels else 6, 4.5), layout="constrained")
    left = figure.add_subplot(1, 2 if has_levels else 1, 1)
    draw_components(left, statistics.whole, ["all", *statistics.groups])
    left.set_ylabel("gradient variance of one draw  tr Cov(g)")
    left.set_title("by group of parameters")
    if has_levels:
        right = figure.add_subplot(1, 2, 2)
        names = level_names(statistics.noise_levels)
        draw_components(right, statistics.levels, names, statistics.levels_error)
        right.set_xlabel("noise level  s = σ / α, in the middle of equally likely bins")
        right.set_title("by noise level")
    save_figure(figure, path)


def table(statistics: GradientStatistics) -> "Table":
    """Return a table of the components of the whole and of each noise level."""
    from rich.table import Table

    whole = statistics.whole
    scale = float(whole.noise_scale[0])
    known = f"{scale:.3g} draws" if math.isfinite(scale) else "above what was measured"
    caption = (
        f"Variance of the gradient of one draw, ± one standard error. Noise scale: {known}, "
        f"the batch size at which the gradient is as large as its noise."
    )
    shown = Table(title="Gradient variance", caption=caption, caption_justify="left")
    shown.add_column("noise level")
    for header in ("total", *(f"{part} %" for part in PARTS), "share %"):
        shown.add_column(header, justify="right")
    fractions = ["", *(f"{100 * value:.0f}" for value in statistics.fractions.tolist())]
    rows = [row for row in _rows(statistics) if row[0] != "group"]
    for (_, name, values, errors), fraction in zip(rows, fractions, strict=True):
        parts = [100 * value / values[3] for value in values[:3]]
        cells = ["" if math.isnan(part) else f"{part:.0f}" for part in parts]
        if not math.isnan(values[3]):
            shown.add_row(
                name, _with_error(values[3], errors[3]), *cells, fraction.replace("nan", "")
            )
    return shown


def _rows(
    statistics: GradientStatistics,
) -> Iterator[tuple[str, str, list[float], list[float]]]:
    kinds = ["whole", *["group"] * len(statistics.groups)]
    names = ["all", *statistics.groups]
    for i, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        yield kind, name, _at(statistics.whole, i), _at(statistics.whole_error, i)
    for i, name in enumerate(level_names(statistics.noise_levels)):
        yield "noise level", name, _at(statistics.levels, i), _at(statistics.levels_error, i)


def _at(components: Components, i: int) -> list[float]:
    return [float(values[i]) for values in components]


def _with_error(value: float, error: float) -> str:
    return f"{value:.3g}" if math.isnan(error) else f"{value:.3g} ± {error:.1g}"


def draw_components(
    axes: "Axes", components: Components, names: list[str], error: Components | None = None
) -> None:
    """Stack the parts, or show the total alone where the parts are unknown."""
    at = np.arange(len(names))
    if bool(components.noise.isnan().all()):
        axes.bar(at, components.total.numpy(), color="tab:grey", label="total")
    else:
        base = np.zeros(len(names))
        for part, color in zip(reversed(PARTS), ("tab:red", "tab:orange", "tab:blue"), strict=True):
            height = np.nan_to_num(getattr(components, part).numpy().clip(min=0))
            axes.bar(at, height, bottom=base, color=color, label=part)
            base += height
    if error is not None:
        total, width = components.total.numpy(), error.total.numpy()
        axes.errorbar(at, total, width, fmt="none", ecolor="black", capsize=2)
    axes.set_xticks(at, names, rotation=45, ha="right")
    axes.grid(which="major", axis="y", alpha=0.3)
    axes.legend()
