"""Why savings that come true differ from what audits predict, on the noisiest four workloads.

Three explanations are measured, in steps, so that no clock is in it. An audit early in the run sees
one state: audits at five points of the plain run, along which the candidate is taken to follow the
same path, predict the harmonic mean of their ratios. And the noise-ratio model (McCandlish et al.
2018, arXiv 1812.06162) assumes a learning rate that is tuned to each variance: both arms train at
several, to the held-out loss that the plain run ends at with the workload's own rate. And it knows
no averages of weights, which lag and take off noise: each run is judged by several.
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

from lightning_vr import CARV, STF, Candidate, DiffusionModule, audit

sys.path.append(str(Path(__file__).parents[1] / "audit"))

from audit_against_training import EVALUATIONS, steps_to
from judged_loss import DECAY, LENGTH, JudgedLoss
from workloads import QUIET, WORKLOADS

REFERENCES = {
    "moons_ve": 1024,
    "checkerboard_flow": 4096,
    "gaussians_encoded": 1024,
    "gaussians_16": 1024,
}
"""Those of the target that is recommended, always with pairs."""

FRACTION = 0.2
"""Of the steps of each workload, as recommendations were tried."""

RATE, FACTORS = 1e-3, (1.0, 0.3, 3.0)
"""The workloads' learning rate, and what it is multiplied by; the first one gives the goal."""

DECAYS, LENGTHS = (DECAY, 0.9, 0.0), (LENGTH, 0.05)
"""Of the averages of weights; a decay of 0 gives the weights that train."""

JUDGES = (*(f"decay {each:g}" for each in DECAYS), *(f"length {each:g}" for each in LENGTHS))
JUDGE = f"length {LENGTH:g}"

POINTS = (0.1, 0.25, 0.5, 0.75, 0.95)


def slots(job: str) -> dict[str, object]:
    return {"target": STF(REFERENCES[job]), "draws": CARV(2, antithetic=True)}


def run(study: Study) -> None:
    audits = Table(study.folder / "gaps_audits.csv", ("job", "point"), ("low", "ratio", "high"))
    trained = Table(study.folder / "gaps_trained.csv", ("job", "arm", "factor", "seed"), JUDGES)
    seeds, factors = ((0,), FACTORS[:1]) if study.is_quick else ((0, 1, 2), FACTORS)
    try:
        for job in [*REFERENCES][:1] if study.is_quick else REFERENCES:
            steps = 30 if study.is_quick else int(FRACTION * WORKLOADS[job].steps)
            along_a_run(audits, study, job, steps)
            for seed in seeds:
                at_learning_rates(trained, study, job, seed, steps, factors)
    finally:
        report(audits, trained)


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
    table: Table, study: Study, job: str, seed: int, steps: int, factors: tuple[float, ...]
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
        found = train(job, seed, steps, factor, goals or None, filled)
        goals = goals or found.last_losses()
        if not table.has(job, arm, factor, seed):
            at = np.array(found.steps)
            needed = {n: steps_to(x, at, np.array(found.losses[n])) for n, x in goals.items()}
            # what never comes there needs at least all its steps
            needed = {n: found.steps[-1] if math.isnan(x) else x for n, x in needed.items()}
            table.add(job=job, arm=arm, factor=factor, seed=seed, **needed)


def train(
    job: str,
    seed: int,
    steps: int,
    factor: float,
    goals: dict[str, float] | None,
    filled: dict[str, object],
) -> JudgedLoss:
    seed_everything(seed, verbose=False)
    module, data = WORKLOADS[job].build(**filled)
    module.optimizer = functools.partial(torch.optim.AdamW, lr=factor * RATE)
    held_out = JudgedLoss(max(1, steps // EVALUATIONS), 1, DECAYS, LENGTHS, goals)
    Trainer(max_steps=steps, callbacks=[held_out], **QUIET).fit(module, datamodule=data)
    return held_out


def report(audits: Table, trained: Table) -> None:
    rows = []
    for job in REFERENCES:
        measured = [audits.select(n, job=job) for n in ("point", "ratio", "low", "high")]
        seeds = {row["seed"] for row in trained.rows if row["job"] == job}
        seeds = [
            seed for seed in sorted(seeds) if trained.has(job, "recommended", FACTORS[0], seed)
        ]
        if not measured[1] or not seeds:
            continue
        points = ", ".join(f"{x:.1f}" for x in measured[1])
        found = {n: [fewer_steps(trained, job, seed, n) for seed in seeds] for n in JUDGES}
        tuned = [fewer_steps(trained, job, seed, JUDGE, is_tuned=True) for seed in seeds]
        cells = (written(x) for x in (*found.values(), tuned))
        rows.append((job, points, along(*measured), *cells, best_factors(trained, job)))
    header = ("workload", "predicted at 10, 25, 50, 75, 95 %", "along the run", *JUDGES)
    more = (f"{JUDGE}, each at its best rate", "best rates, plain and recommended")
    print("Times fewer steps, 95 % intervals:\n" + markdown((*header, *more), rows))


def along(points: list[float], ratios: list[float], lows: list[float], highs: list[float]) -> str:
    """Return the harmonic mean, as the candidate needs 1 / ratio of each of the plain steps.

    Each point counts for the part of the run that is nearest to it.
    """
    middles = [(a + b) / 2 for a, b in itertools.pairwise(points)]
    parts = np.diff([0.0, *middles, 1.0]) / np.array(ratios)
    errors = parts / parts.sum() * np.log(np.array(highs) / np.array(lows)) / 2
    mean, half = 1 / parts.sum(), float(np.sqrt((errors**2).sum()))
    return f"{mean:.2f} ({mean * math.exp(-half):.2f} to {mean * math.exp(half):.2f})"


def fewer_steps(table: Table, job: str, seed: str, name: str, is_tuned: bool = False) -> float:
    """Return steps of the plain arm over those of the other, both at rate 1 or at their best."""
    chosen = {} if is_tuned else {"factor": FACTORS[0]}
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
            for found in [table.select(JUDGE, job=job, arm=arm, factor=factor)]
            if found
        }
        best.append(f"× {min(means, key=lambda factor: means[factor]):g}")
    return ", ".join(best)


def written(ratios: list[float]) -> str:
    """Return the geometric mean and its 95 % interval over seeds, if there are any."""
    if not ratios:
        return ""
    mean, half = mean_and_half(np.log(ratios).tolist())
    low, high = math.exp(mean - half), math.exp(mean + half)
    return f"{math.exp(mean):.2f} ({low:.2f} to {high:.2f})"
