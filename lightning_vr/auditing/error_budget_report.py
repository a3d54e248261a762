"""Reports of an error budget: tables, a page, a picture, and all numbers as CSV and JSON."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_vr.auditing.sampling_errors import SamplingErrors
from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.variance.error_budget import ErrorBudget

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTALS = ("initialisation", "discretisation", "learned_score", "bound")
"""Properties of a budget, as columns of the table of grids."""

STEPS = (
    "noise_levels",
    "next_levels",
    "step_fraction",
    "distance",
    "excess_loss",
    "amplification",
    "local_bias",
    "score",
    "carried",
)
"""Properties of a budget, as columns of the table of steps."""

_CAPTION = (
    "Root mean squares over samples and dimensions, in units of the data. Initialisation, "
    "discretisation and learned score, carried to the end by the amplification of later steps, "
    "add up to the bound. The directional bound counts what points along the error alone; error is "
    "that of the sampler on the same trajectories."
)


def table(errors: SamplingErrors) -> Table:
    """Return one row for each grid."""
    shown = Table(title="Error budget", caption=_CAPTION, caption_justify="left", box=SIMPLE_HEAD)
    shown.pad_edge, shown.collapse_padding = False, True
    shown.add_column("grid", min_width=11)
    for header in _grid_headers()[1:]:
        # broken by hand: in whole words the table is wider than a terminal of 80 columns
        broken = header.replace("isation", "-\nisation").replace("direct", "direc-\nt")
        shown.add_column(broken.replace("_", "\n"), justify="right", no_wrap=True)
    for row in _grid_rows(errors):
        shown.add_row(*row)
    return shown


def save(errors: SamplingErrors, folder: str | Path) -> None:
    """Write ``error_budget`` as json, md, csv and png to a folder, made if it is missing."""
    folder = Path(folder)
    texts = {"json": json.dumps(_numbers(errors), indent=2, allow_nan=False), "md": page(errors)}
    for suffix, text in texts.items():
        with replacing(folder / f"error_budget.{suffix}", "w", encoding="utf-8") as file:
            file.write(text)
    with replacing(folder / "error_budget.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["grid", "step", *STEPS, "error"])
        for name, budget in errors.budgets.items():
            writer.writerows([name, step, *row] for step, row in enumerate(_steps(budget)))
    draw(errors, folder / "error_budget.png")


def page(errors: SamplingErrors) -> str:
    """Return the budget as Markdown."""
    grids = [_grid_headers(), *_grid_rows(errors)]
    steps = [["step", *STEPS, "error"]]
    steps += [[str(i), *map(_short, row)] for i, row in enumerate(_steps(errors.own))]
    lines = ["# Error budget", "", f"**{errors.advice}**", "", *_markdown(grids), "", _CAPTION, ""]
    lines += [f"Steps of the own grid, {errors.solver}, {errors.samples} samples:", ""]
    return "\n".join([*lines, *_markdown(steps), "", "![error budget](error_budget.png)", ""])


@frees_figure
def draw(errors: SamplingErrors, path: Path) -> None:
    """Draw what each step of the own grid adds, and the budgets of all grids."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4.5), layout="constrained")
    steps, weights, grids = figure.subplots(1, 3)
    _draw_steps(steps, errors.own)
    _draw_weights(weights, errors)
    _draw_grids(grids, errors)
    save_figure(figure, path)


def _draw_steps(axes: "Axes", budget: ErrorBudget) -> None:
    for name, part in (("discretisation", budget.local_bias), ("learned score", budget.score)):
        axes.loglog(budget.noise_levels, budget.carried * part, "o-", markersize=4, label=name)
    axes.loglog(budget.noise_levels, budget.error[1:], "k--", linewidth=1, label="error so far")
    axes.invert_xaxis()
    axes.set_xlabel("noise level  s = σ / α  where the step begins")
    axes.set_title("what each step adds to the error at the end")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_weights(axes: "Axes", errors: SamplingErrors) -> None:
    own = errors.own
    for label, values in (
        ("total weight W of training", errors.total_weight),
        ("learned score, over the step fraction", own.carried * own.score / own.step_fraction),
    ):
        axes.semilogx(own.noise_levels, values / values.max(), "o-", markersize=4, label=label)
    axes.invert_xaxis()
    axes.set_xlabel("noise level  s = σ / α")
    axes.set_title("where training looks, and where sampling needs it")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_grids(axes: "Axes", errors: SamplingErrors) -> None:
    names = list(errors.budgets)
    base = [0.0] * len(names)
    for part, color in zip(TOTALS[:-1], ("tab:green", "tab:blue", "tab:orange"), strict=True):
        widths = [getattr(budget, part) for budget in errors.budgets.values()]
        axes.barh(names, widths, left=base, color=color, label=part.replace("_", " "))
        base = [x + y for x, y in zip(base, widths, strict=True)]
    ends = [float(budget.error[-1]) for budget in errors.budgets.values()]
    axes.plot(ends, range(len(names)), "k|", markersize=14, label="error of the sampler")
    axes.invert_yaxis()
    axes.set_title("bound on the error at the end, by grid")
    axes.legend()


def _grid_headers() -> list[str]:
    return ["grid", "steps", *TOTALS, "directional_bound", "error"]


def _grid_rows(errors: SamplingErrors) -> list[list[str]]:
    return [
        [
            name,
            str(len(budget.noise_levels)),
            *(_short(getattr(budget, part)) for part in (*TOTALS, "directional_bound")),
            _short(float(budget.error[-1])),
        ]
        for name, budget in errors.budgets.items()
    ]


def _steps(budget: ErrorBudget) -> list[list[float]]:
    columns = [getattr(budget, name).tolist() for name in STEPS]
    return [list(row) for row in zip(*columns, budget.error[1:].tolist(), strict=True)]


def _numbers(errors: SamplingErrors) -> dict[str, Any]:
    grids = {
        name: {part: getattr(budget, part) for part in TOTALS}
        | {"directional_bound": budget.directional_bound, "error": float(budget.error[-1])}
        | {"steps": _steps(budget)}
        for name, budget in errors.budgets.items()
    }
    return {
        "advice": errors.advice,
        "solver": errors.solver,
        "samples": errors.samples,
        "total_weight": errors.total_weight.tolist(),
        "columns_of_steps": [*STEPS, "error"],
        "grids": grids,
    }


def _markdown(rows: list[list[str]]) -> list[str]:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _short(value: float) -> str:
    return f"{value:.3g}"
