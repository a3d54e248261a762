"""What audits predicted for each workload, and what came true: one picture, with the diagonal.

It reads the ``results.csv`` that ``examples/audit/recommendations.py`` writes.
"""

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter
from study import Study, markdown, mean_and_half

sys.path.append(str(Path(__file__).parents[1] / "audit"))

from recommendations import JUDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 1.25
"""Factor within which a prediction is said to have come true."""

SMALL = 0.85, 1.5
"""Savings of the second panel, which shows the crowd of small ones."""


@dataclass(frozen=True)
class Outcome:
    """What was predicted for a workload, with 95 %, and what came true in each seed."""

    workload: str
    candidate: str
    is_recommended: bool
    predicted: tuple[float, float, float]
    realised: dict[str, list[float]]

    def mean(self, judge: str) -> float:
        """Return the geometric mean over seeds."""
        return math.exp(float(np.log(self.realised[judge]).mean()))

    def came_true(self, judge: str) -> bool:
        return abs(math.log(self.predicted[0] / self.mean(judge))) < math.log(NEAR)


def run(study: Study) -> None:
    if not study.predictions.exists():
        print(f"{study.predictions} is missing: run examples/audit/recommendations.py first.")
        return
    outcomes = read(study.predictions)
    names = [f"{what}, {judge}" for judge in JUDGES.values() for what in ("realised", "over it")]
    header = ("workload", "candidate", "recommended", "predicted", *names)
    print(markdown(header, map(cells, outcomes)))
    recommended = [outcome for outcome in outcomes if outcome.is_recommended]
    for judge, name in JUDGES.items():
        near = [outcome for outcome in outcomes if outcome.came_true(judge)]
        counts = f"{len(near)} of {len(outcomes)}"
        counts += f", of the recommended {len([o for o in near if o.is_recommended])}"
        print(f"within a factor of {NEAR} by {name}: {counts} of {len(recommended)}")
    draw(outcomes, study)


def read(path: Path) -> list[Outcome]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        own = [row for row in rows if row["workload"] == name]
        first = own[0]
        predicted = float(first["predicted"]), float(first["low"]), float(first["high"])
        realised = {judge: [float(row[judge]) for row in own] for judge in JUDGES}
        is_recommended = first["is_recommended"] == "True"
        found.append(Outcome(name, first["candidate"], is_recommended, predicted, realised))
    return found


def cells(outcome: Outcome) -> list[str]:
    row = [outcome.workload, outcome.candidate, "yes" if outcome.is_recommended else "no"]
    row.append(with_interval(*outcome.predicted))
    for judge, savings in outcome.realised.items():
        mean, half = mean_and_half(np.log(savings).tolist())
        row.append(with_interval(*(math.exp(x) for x in (mean, mean - half, mean + half))))
        row.append(f"{outcome.predicted[0] / outcome.mean(judge):.2f}")
    return row


def with_interval(estimate: float, low: float, high: float) -> str:
    return f"{estimate:.2f} ({low:.2f} to {high:.2f})"


def draw(outcomes: list[Outcome], study: Study) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    whole, small = figure.subplots(1, 2)
    most = max(max(o.predicted[2], *o.realised["realised"]) for o in outcomes)
    for axes, ends in ((whole, (SMALL[0], 1.1 * most)), (small, SMALL)):
        draw_panel(axes, outcomes, ends)
    whole.set_title("all workloads")
    small.set_title(f"savings below {SMALL[1]:g}")
    whole.set_ylabel("realised saving, mean and range of seeds")
    handles, labels = whole.get_legend_handles_labels()
    title = "hollow: not recommended"
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=title)
    figure.savefig(study.folder / "predictions.png", dpi=100)


def draw_panel(axes: "Axes", outcomes: list[Outcome], ends: tuple[float, float]) -> None:
    for i, outcome in enumerate(outcomes):
        (x, low, high), savings = outcome.predicted, outcome.realised["realised"]
        y = outcome.mean("realised")
        axes.errorbar(
            x,
            y,
            [[y - min(savings)], [max(savings) - y]],
            [[x - low], [high - x]],
            fmt="o" if i < 10 else "s",
            color=f"C{i % 10}",
            markerfacecolor=f"C{i % 10}" if outcome.is_recommended else "white",
            capsize=2,
            label=outcome.workload,
        )
    line = np.array(ends)
    axes.plot(line, line, color="black", linewidth=0.8)
    axes.fill_between(line, line / NEAR, line * NEAR, alpha=0.1, color="black", linewidth=0)
    ticks = [x for x in (0.9, 1, 1.1, 1.2, 1.3, 1.4, 2, 3, 5, 10) if ends[0] < x < ends[1]]
    if ends[1] > 2:
        ticks = [x for x in ticks if x == int(x)]
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("predicted saving, 95 % interval")
    axes.grid(alpha=0.3)
