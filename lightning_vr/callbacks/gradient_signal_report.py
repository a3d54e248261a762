"""Reports of a gradient's signal: rows of a file, a map of cosines, tables and sentences."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_vr.callbacks.gradient_variance_report import axis_label, with_error
from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.lifecycle.curve_log import CurveLog, log_rows, open_curve_log
from lightning_vr.lifecycle.loggers import (
    level_names,
    log_numbers,
    log_picture,
    training_goes_on,
)
from lightning_vr.variance.accounting import batch_scaling
from lightning_vr.variance.gradient_statistics import NOISE_LEVEL
from lightning_vr.variance.signal_statistics import SignalStatistics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MEASURED = ("product", "cosine", "variance", "noise_scale")

COLUMNS = ("of", "name", "other", *(name + e for name in _MEASURED for e in ("", "_error")))
"""Columns of ``gradient_signal.csv`` after ``step``."""

_BATCHES = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
"""Batch sizes that are compared, in units of the present one."""


def open_log(trainer: Trainer, logged_step: int) -> CurveLog:
    """Return the file; all ranks call it. ``logged_step`` is that of ``open_curve_log``."""
    return open_curve_log(trainer, "gradient_signal", COLUMNS, logged_step)


def log(trainer: Trainer, statistics: SignalStatistics, curves: CurveLog | None) -> None:
    """Send a few numbers to loggers, and all of them to the file and to what callbacks monitor."""
    found = {f"gradient_signal/{name}": x for name, x in _numbers(statistics) if math.isfinite(x)}
    whole = {name: value for name, value in found.items() if name.count("/") == 1}
    log_numbers(trainer, whole, {k: v for k, v in found.items() if k not in whole})
    log_rows(trainer, curves, rows(statistics))


def show(
    trainer: Trainer, statistics: SignalStatistics, folder: Path, *, is_logged: bool = True
) -> None:
    """Draw the map in the run's folder, and show it and a table in loggers; on rank 0 alone."""
    path = folder / "gradient_signal.png"
    with training_goes_on(trainer, "GradientSignal's report"):
        draw(statistics, path)
        if is_logged:
            log_picture(trainer, "gradient_signal", path, (COLUMNS, rows(statistics)))


def rows(statistics: SignalStatistics) -> list[list[float | str]]:
    """Return a row of ``COLUMNS`` for the whole, each bin, and each pair of bins."""
    names = ["all", *level_names(statistics.noise_levels)]
    products, cosines = statistics.products, statistics.cosines
    variances, scales = statistics.variances, statistics.noise_scales
    found: list[list[float | str]] = []
    for i, name in enumerate(names):
        own = [float(x[i]) for pair in (variances, scales) for x in pair]
        for j in range(i, len(names)):
            shared = [float(x[i, j]) for pair in (products, cosines) for x in pair]
            kind = "pair" if i != j else statistics.axis if i else "whole"
            found.append([kind, name, names[j], *shared, *(own if i == j else [math.nan] * 4)])
    return found


@frees_figure
def draw(statistics: SignalStatistics, path: Path) -> None:
    """Draw the cosines of all pairs of bins; those that are not resolved are grey."""
    from matplotlib.figure import Figure

    names = ["all", *level_names(statistics.noise_levels)]
    cosines, errors = statistics.cosines
    size = 2.5 + 0.55 * len(names)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    axes = figure.add_subplot(facecolor="lightgrey")
    image = axes.imshow(cosines.numpy(), cmap="RdBu", vmin=-1, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            if i != j and math.isfinite(cosines[i, j]):
                text = f"{float(cosines[i, j]):.2f}\n±{float(errors[i, j]):.2f}"
                color = "white" if abs(cosines[i, j]) > 0.6 else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"{axis_label(statistics.axis)}, in the middle of equally likely bins")
    axes.set_title("cosine of mean gradients")
    figure.colorbar(image, ax=axes, shrink=0.8)
    save_figure(figure, path)


def tell(console: "Console", statistics: SignalStatistics, batch: int) -> None:
    """Print noise scales, what other batch sizes change, and whether levels pull apart.

    Args:
        console: Where to.
        statistics: What was measured.
        batch: Samples of an optimizer step, over ranks and accumulation.
    """
    console.print(scales_table(statistics))
    scale = float(statistics.noise_scales[0][0])
    if math.isfinite(scale) and scale > 0:
        console.print(batch_table(scale, batch))
    console.print(batch_sentence(statistics, batch))
    console.print(conflict_sentence(statistics))


def scales_table(statistics: SignalStatistics) -> "Table":
    """Return a table of the noise scale of the whole and of each bin."""
    from rich.table import Table

    shown = Table(title="Gradient signal")
    for header in (statistics.axis, "‖mean gradient‖²", "noise scale", "cosine with all"):
        shown.add_column(header, justify="left" if header == statistics.axis else "right")
    products, cosines = statistics.products, statistics.cosines
    for i, name in enumerate(["all", *level_names(statistics.noise_levels)]):
        cells = [with_error(products[0][i, i], products[1][i, i]), _scale(statistics, i)]
        cells.append(with_error(cosines[0][0, i], cosines[1][0, i]) if i else "")
        shown.add_row(name, *cells)
    return shown


def batch_table(noise_scale: float, batch: int) -> "Table":
    """Return a table of what other batch sizes change, by the model of ``batch_scaling``."""
    from rich.table import Table

    caption = (
        "To the same loss, times the present. A model: SGD as in arXiv 1812.06162, Adam by the "
        "square root rule of arXiv 2205.10287, which holds up to the noise scale."
    )
    shown = Table(title="Batch size", caption=caption, caption_justify="left")
    headers = ("batch", "steps", "samples", "learning rate, SGD", "learning rate, Adam")
    for header in headers:
        shown.add_column(header, justify="right")
    sizes = sorted({*(max(1, round(batch * x)) for x in _BATCHES), _critical(noise_scale)})
    for size in sizes:
        found = batch_scaling(noise_scale, batch, size)
        ratios = (found.steps, found.samples, found.sgd, found.adam)
        shown.add_row(str(size), *(f"x{ratio:.3g}" for ratio in ratios))
    return shown


def batch_sentence(statistics: SignalStatistics, batch: int) -> str:
    """Return what the noise scale says of the batch size."""
    scales, errors = (x[0] for x in statistics.noise_scales)
    scale = float(scales)
    if not (math.isfinite(scale) and scale > 0):
        return (
            f"The gradient is not resolved from its noise in "
            f"{statistics.count:.0f} measurements: the noise scale is {_scale(statistics, 0)}."
        )
    critical = _critical(scale)
    found = batch_scaling(scale, batch, critical)
    text = f"Noise scale: {with_error(scales, errors)} samples; a step has {batch}. "
    change = (
        f"A batch of {critical} would take {found.steps:.2g} times the steps and "
        f"{found.samples:.2g} times the samples, at {found.sgd:.2g} times the learning rate with "
        f"SGD and {found.adam:.2g} times with Adam."
    )
    if critical > batch:
        return text + "Noise dominates: larger batches with larger learning rates pay. " + change
    return text + "Larger batches save few steps. " + change


def conflict_sentence(statistics: SignalStatistics) -> str:
    """Return which noise levels pull against each other, or that none are known to."""
    found = statistics.conflict()
    count = f"{statistics.count:.0f} measurements"
    if found is None:
        return f"No two {statistics.axis}s are known to pull against each other ({count})."
    names = level_names(statistics.noise_levels)
    low, high = (
        names[start] if stop - start == 1 else f"{names[start]} to {names[stop - 1]}"
        for start, stop in (found.low, found.high)
    )
    return (
        f"At {statistics.axis} {low} the gradient pulls against that at {high}: cosine "
        f"{found.cosine:.2f} ± {found.error:.2g} ({count})."
    )


def _numbers(statistics: SignalStatistics) -> Iterator[tuple[str, float]]:
    products, scales = statistics.products[0].diagonal(), statistics.noise_scales[0]
    yield "noise_scale", float(scales[0])
    yield "squared_mean", float(products[0])
    letter = "s" if statistics.axis == NOISE_LEVEL else "t"
    names = [letter + name for name in level_names(statistics.noise_levels)]
    cosines = statistics.cosines[0][1:, 1:]
    for i, name in enumerate(names):
        yield f"noise_scale/{name}", float(scales[1 + i])
        for j in range(i + 1, len(names)):
            yield f"cosine/{name}/{names[j]}", float(cosines[i, j])


def _critical(noise_scale: float) -> int:
    return max(1, round(noise_scale))


def _scale(statistics: SignalStatistics, i: int) -> str:
    scale, error = (float(x[i]) for x in statistics.noise_scales)
    if math.isfinite(scale):
        return with_error(scale, error)
    bound = float(statistics.least_noise_scales[i])
    return f"above {bound:.2g}" if math.isfinite(bound) else ""
