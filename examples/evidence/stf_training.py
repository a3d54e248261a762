"""Does STF train faster, or better, with VE? Fréchet distance against references and seconds.

Source: Xu, Tong and Jaakkola 2023, arXiv 2302.00670, figures 4a and 5, section 6.3, appendix E.1.
"""

import math
import statistics

import numpy as np
from digits_models import STEPS, frechet, model
from matplotlib.figure import Figure
from scipy.special import fdtri
from study import Study, Table, interval, markdown, mean_and_half

from lightning_vr import Sampler

ARMS = ("ve, n = 1", "ve, n = 16", "ve, n = all")
SEEDS = (0, 1, 2)


def run(study: Study) -> None:
    table = Table(
        study.folder / "stf_training.csv", ("arm", "seed", "step"), ("seconds", "distance")
    )
    seeds, steps = ((0,), (2, 4)) if study.is_quick else (SEEDS, STEPS[1:])
    count, sampler = (64, Sampler(steps=2)) if study.is_quick else (1000, Sampler(steps=12))
    for seed in seeds:
        for arm in ARMS:
            for step in steps:
                if not table.has(arm, seed, step):
                    found, seconds = model(arm, seed, step, study)
                    study.check_time()
                    distance = frechet(found, sampler, count, seed)
                    table.add(arm=arm, seed=seed, step=step, seconds=seconds, distance=distance)
    report(table, steps)
    draw(table, steps, study)


def report(table: Table, steps: tuple[int, ...]) -> None:
    rows = []
    seeds = dict.fromkeys(row["seed"] for row in table.rows)
    for arm in ARMS:
        cells = [interval(table.select("distance", arm=arm, step=step), 2) for step in steps]
        last = table.select("distance", arm=arm, step=steps[-1])
        plain = table.select("distance", arm=ARMS[0], step=steps[-1])
        less = interval([a - b for a, b in zip(last, plain, strict=True)], 2)
        spread = spread_below(last, plain) if len(last) > 1 else ("", "")
        seconds = interval(table.select("seconds", arm=arm, step=steps[-1]), 1)
        savings = (
            interval([speedup(table, arm, seed, steps, unit) for seed in seeds], 2)
            for unit in ("step", "seconds")
        )
        rows.append((arm, *cells, less, *spread, seconds, *savings))
    header = ("arm", *(f"step {step}" for step in steps), "less n = 1", "deviation")
    ratios = "that of n = 1 over it", "seconds"
    sooner = "times fewer steps to the end of n = 1", "times fewer seconds"
    print(markdown((*header, *ratios, *sooner), rows))


def spread_below(found: list[float], plain: list[float]) -> tuple[str, str]:
    """Return the standard deviation, and that of plain over it with the interval of the F test."""
    deviation, count = statistics.stdev(found), len(found) - 1
    ratio, factor = statistics.stdev(plain) / deviation, math.sqrt(fdtri(count, count, 0.975))
    return f"{deviation:.2f}", f"{ratio:.2g} ({ratio / factor:.2g} to {ratio * factor:.2g})"


def speedup(table: Table, arm: str, seed: str, steps: tuple[int, ...], unit: str) -> float:
    """Return the cost of n = 1, in a column as unit, over that of an arm to its last distance.

    Distances are interpolated linearly in both logarithms.
    """
    goal = np.log(table.select("distance", arm=ARMS[0], seed=seed, step=steps[-1])[0])
    plain = table.select(unit, arm=ARMS[0], seed=seed, step=steps[-1])[0]
    costs, distances = (
        np.log([table.select(name, arm=arm, seed=seed, step=step)[0] for step in steps])
        for name in (unit, "distance")
    )
    return float(plain / np.exp(np.interp(-goal, -distances, costs)))


def draw(table: Table, steps: tuple[int, ...], study: Study) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in ARMS:
        means = [mean_and_half(table.select("distance", arm=arm, step=step)) for step in steps]
        seconds = [np.mean(table.select("seconds", arm=arm, step=step)) for step in steps]
        y, half = np.array(means).T
        left.errorbar(seconds, y, np.nan_to_num(half), capsize=3, label=arm)
    left.set_xlabel("CPU seconds of training")
    left.set_ylabel("Fréchet distance, digit features, n = 1000")
    left.set_xscale("log")
    left.set_yscale("log")
    left.legend()
    for seed in sorted({row["seed"] for row in table.rows}):
        last = [table.select("distance", arm=a, step=steps[-1], seed=seed)[0] for a in ARMS]
        right.plot([a.split("= ")[1] for a in ARMS], last, "o-", label=f"seed {seed}")
    right.set_xlabel("references n")
    right.set_title(f"after {steps[-1]} steps")
    right.legend()
    for each in (left, right):
        each.grid(alpha=0.3)
    figure.savefig(study.folder / "stf_training.png", dpi=100)
