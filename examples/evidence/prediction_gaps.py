"""Why audits predict more than comes true, on the three workloads where they were furthest off.

Three explanations are measured, in steps, so that no clock is in it. An audit early in the run sees
one state: audits at five points of the plain run, along which the candidate is taken to follow the
same path, predict the harmonic mean of their ratios. And the noise-ratio model (McCandlish et al.
2018, arXiv 1812.06162) assumes a learning rate that is tuned to each variance: both arms train at
several, to the held-out loss that the plain run ends at with the workload's own rate. And it knows
no averages of weights, which lag and take off noise: both arms train with shorter ones, too.
"""

import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from study import Study, Table, markdown, mean_and_half, processor_clock

from lightning_vr import CARV, EMA, STF, Candidate, DiffusionModule, audit

sys.path.append(str(Path(__file__).parents[1] / "audit"))

from audit_against_training import EVALUATIONS, HeldOutLoss, steps_to
from workloads import QUIET, WORKLOADS

REFERENCES = {
    "moons_ve": 1024,
    "checkerboard_flow": 4096,
    "gaussians_encoded": 1024,
    "gaussians_16": 1024,
}
"""Those of the target that is recommended, always with pairs; the last one came true."""

FRACTION = 0.2
"""Of the steps of each workload, as recommendations were tried."""

RATE, FACTORS = 1e-3, (1, 3)
DECAY, SHORT = 0.98, 0.9
"""Of the averages of weights."""

POINTS = (0.1, 0.25, 0.5, 0.75, 0.95)


def slots(job: str) -> dict[str, object]:
    return {"target": STF(REFERENCES[job]), "draws": CARV(2, antithetic=True)}


def run(study: Study) -> None:
    audits = Table(study.folder / "gaps_audits.csv", ("job", "point"), ("low", "ratio", "high"))
    keys = ("job", "arm", "factor", "seed")
    trained, shortly = (
        Table(study.folder / f"{name}.csv", keys, ("averaged", "raw"))
        for name in ("gaps_trained", "gaps_short_averages")
    )
    seeds, factors = ((0,), FACTORS[:1]) if study.is_quick else ((0, 1, 2), FACTORS)
    try:
        for job in [*REFERENCES][:1] if study.is_quick else REFERENCES:
            steps = 30 if study.is_quick else int(FRACTION * WORKLOADS[job].steps)
            along_a_run(audits, study, job, steps)
            for seed in seeds:
                at_learning_rates(trained, study, job, seed, steps, factors)
                at_learning_rates(shortly, study, job, seed, steps, factors[:1], SHORT)
    finally:
        report(audits, trained, shortly)


class Keep(Callback):
    """The weights at some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.weights = steps, {}

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        if trainer.global_step in self.steps:
            state = module.state_dict()
            self.weights[trainer.global_step] = {name: x.clone() for name, x in state.items()}


def along_a_run(table: Table, study: Study, job: str, steps: int) -> None:
    """Audit at points of the plain run what was recommended at a quarter of it."""
    points = POINTS[:1] if study.is_quick else POINTS
    if all(table.has(job, point) for point in points):
        return
    study.check_time()
    kept = Keep([round(point * steps) for point in points])
    seed_everything(100, verbose=False)
    module, data = WORKLOADS[job].build()
    Trainer(max_steps=steps, callbacks=[kept], **QUIET).fit(module, datamodule=data)
    for point, step in zip(points, kept.steps, strict=True):
        if table.has(job, point):
            continue
        study.check_time()
        module.load_state_dict(kept.weights[step])
        rivals = [Candidate("recommended", **slots(job))]
        with processor_clock():
            found = audit(module, data, rivals, budget=3.0, progress=False)
        current, own = found.estimators
        # seconds are left out
        ratios = [x * own.seconds / current.seconds for x in own.predicted_speedup]
        table.add(job=job, point=point, ratio=ratios[0], low=ratios[1], high=ratios[2])


def at_learning_rates(
    table: Table,
    study: Study,
    job: str,
    seed: int,
    steps: int,
    factors: tuple[int, ...],
    decay: float = DECAY,
) -> None:
    """Train both arms at multiples of the workload's learning rate."""
    arms = [(arm, factor) for arm in ("plain", "recommended") for factor in factors]
    if all(table.has(job, *arm, seed) for arm in arms):
        return
    goals: dict[str, float] = {}
    for arm, factor in arms:
        # the first arm gives the goal of all
        if goals and table.has(job, arm, factor, seed):
            continue
        study.check_time()
        filled = slots(job) if arm == "recommended" else {}
        found = train(job, seed, steps, factor, filled, decay)
        losses = {name: np.array(values) for name, values in found.losses.items()}
        goals = goals or {n: x[int(0.7 * len(x)) :].mean() for n, x in losses.items()}
        if not table.has(job, arm, factor, seed):
            needed = {n: steps_to(goals[n], np.array(found.steps), losses[n]) for n in goals}
            # what never comes there needs at least all its steps
            needed = {n: found.steps[-1] if math.isnan(x) else x for n, x in needed.items()}
            table.add(job=job, arm=arm, factor=factor, seed=seed, **needed)


def train(
    job: str, seed: int, steps: int, factor: int, filled: dict[str, object], decay: float
) -> HeldOutLoss:
    seed_everything(seed, verbose=False)
    module, data = WORKLOADS[job].build(**filled)
    module.optimizer = functools.partial(torch.optim.AdamW, lr=factor * RATE)
    held_out = HeldOutLoss(max(1, steps // EVALUATIONS), repeats=1)
    callbacks = [EMA(decay=decay), held_out]
    Trainer(max_steps=steps, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    return held_out


def report(audits: Table, trained: Table, shortly: Table) -> None:
    rows = []
    for job in REFERENCES:
        measured = [audits.select(n, job=job) for n in ("point", "ratio", "low", "high")]
        ratios = measured[1]
        whole = [r for r in trained.rows if r["job"] == job and r["arm"] == "recommended"]
        seeds = dict.fromkeys(row["seed"] for row in whole)
        if not ratios or not seeds:
            continue
        points = ", ".join(f"{x:.1f}" for x in ratios)
        fixed, raw, tuned = (
            [fewer_steps(trained, job, seed, name, is_tuned) for seed in seeds]
            for name, is_tuned in (("averaged", False), ("raw", False), ("averaged", True))
        )
        short = [
            fewer_steps(shortly, job, seed, "averaged", is_tuned=False)
            for seed in seeds
            if shortly.has(job, "recommended", 1, seed)
        ]
        cells = (written(x) for x in (fixed, short, raw, tuned))
        rows.append((job, points, along(*measured), *cells, best_factors(trained, job)))
    header = ("workload", "predicted at 10, 25, 50, 75, 95 %", "along the run", "realised, rate 1")
    more = ("of short averages", "of raw weights", "each at its best rate")
    header = (*header, *more, "best rates, plain and recommended")
    print("Times fewer steps, 95 % intervals:\n" + markdown(header, rows))


def along(points: list[float], ratios: list[float], lows: list[float], highs: list[float]) -> str:
    """Return the harmonic mean, as the candidate needs 1 / ratio of each of the plain steps.

    Each point counts for the part of the run that is nearest to it.
    """
    middles = [(a + b) / 2 for a, b in itertools.pairwise(points)]
    parts = np.diff([0.0, *middles, 1.0]) / np.array(ratios)
    errors = parts / parts.sum() * np.log(np.array(highs) / np.array(lows)) / 2
    mean, half = 1 / parts.sum(), float(np.sqrt((errors**2).sum()))
    return f"{mean:.2f} ({mean * math.exp(-half):.2f} to {mean * math.exp(half):.2f})"


def fewer_steps(table: Table, job: str, seed: str, name: str, is_tuned: bool) -> float:
    """Return steps of the plain arm over those of the other, both at rate 1 or at their best."""
    chosen = {} if is_tuned else {"factor": 1}
    plain, other = (
        min(table.select(name, job=job, seed=seed, arm=arm, **chosen))
        for arm in ("plain", "recommended")
    )
    return plain / other


def best_factors(table: Table, job: str) -> str:
    best = []
    for arm in ("plain", "recommended"):
        means = {
            factor: mean_and_half(found)[0]
            for factor in FACTORS
            for found in [table.select("averaged", job=job, arm=arm, factor=factor)]
            if found
        }
        best.append(f"× {min(means, key=lambda factor: means[factor])}")
    return ", ".join(best)


def written(ratios: list[float]) -> str:
    """Return the geometric mean and its 95 % interval over seeds, if there are any."""
    if not ratios:
        return ""
    mean, half = mean_and_half(np.log(ratios).tolist())
    low, high = math.exp(mean - half), math.exp(mean + half)
    return f"{math.exp(mean):.2f} ({low:.2f} to {high:.2f})"
