"""What audits predicted for each workload, and what came true: one picture, with the diagonal.

It reads the ``results.csv`` that ``examples/audit/recommendations.py`` writes.
"""

import csv
import math

import numpy as np
from matplotlib.figure import Figure
from study import Study, markdown, mean_and_half

NEAR = 1.25
"""Factor within which a prediction is said to have come true."""


def run(study: Study) -> None:
    if not study.predictions.exists():
        print(f"{study.predictions} is missing: run examples/audit/recommendations.py first.")
        return
    with study.predictions.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in dict.fromkeys(row["workload"] for row in rows if row["recommended"]):
        own = [row for row in rows if row["workload"] == name]
        predicted = [float(own[0][key]) for key in ("predicted", "low", "high")]
        found[name] = predicted, np.log([float(row["realised"]) for row in own])
    none = [row["workload"] for row in rows if not row["recommended"]]
    errors = [math.log(predicted[0]) - logs.mean() for predicted, logs in found.values()]
    near = sum(abs(error) < math.log(NEAR) for error in errors)
    print(markdown(("workload", "predicted", "realised", "predicted over realised"), table(found)))
    print(f"within a factor of {NEAR}: {near} of {len(found)}")
    print(f"nothing recommended, nothing to come true: {', '.join(none)}")
    draw(found, study)


def table(found: dict[str, tuple[list[float], np.ndarray]]) -> list[tuple]:
    rows = []
    for name, (predicted, logs) in found.items():
        mean, half = mean_and_half(logs)
        cells = (f"{math.exp(x):.2f}" for x in (mean, mean - half, mean + half))
        realised = "{} ({} to {})".format(*cells)
        over = f"{predicted[0] / math.exp(mean):.2f}"
        rows.append((name, "{:.2f} ({:.2f} to {:.2f})".format(*predicted), realised, over))
    return rows


def draw(found: dict[str, tuple[list[float], np.ndarray]], study: Study) -> None:
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, (predicted, logs) in found.items():
        points = np.exp(logs)
        y = math.exp(logs.mean())
        sides = [[predicted[0] - predicted[1]], [predicted[2] - predicted[0]]]
        ends = [[y - points.min()], [points.max() - y]]
        axes.errorbar(predicted[0], y, ends, sides, fmt="o", capsize=2, label=name)
    line = np.array([0.9, 10.0])
    axes.plot(line, line, color="black", linewidth=0.8)
    axes.fill_between(line, line / NEAR, line * NEAR, alpha=0.1, color="black")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted saving, 95 % interval")
    axes.set_ylabel("realised saving, mean and range of seeds")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(study.folder / "predictions.png", dpi=100)
