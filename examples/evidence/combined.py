"""Antithetic pairs in training, and pairs, strata, a learned proposal and STF together.

Steps and processor seconds to the held-out loss of the plain run's end, on workloads of the study
``examples/audit``. No paper trains with pairs, and none puts these together.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from study import Study, Table, interval, markdown

from lightning_vr import CARV, STF, DiffusionModule, LearnedProposal

sys.path.append(str(Path(__file__).parents[1] / "audit"))

from audit_against_training import HeldOutLoss, steps_to
from workloads import QUIET, WORKLOADS

ARMS = {
    "plain": dict,
    "pairs": lambda: {"draws": CARV(2, antithetic=True)},
    "strata, q learned": lambda: {"draws": CARV(1, LearnedProposal())},
    "STF(1024)": lambda: {"target": STF(1024)},
    "all": lambda: {"draws": CARV(2, LearnedProposal(), antithetic=True), "target": STF(1024)},
}
JOBS = ("gaussians_16", "moons_ve")
EVALUATIONS = 30


class TimedHeldOutLoss(HeldOutLoss):
    """Knows the seconds that it takes, which are not training."""

    seconds = 0.0

    def measure(self, module: DiffusionModule) -> float:
        started = time.process_time()
        found = super().measure(module)
        self.seconds += time.process_time() - started
        return found


def run(study: Study) -> None:
    table = Table(study.folder / "combined.csv", ("job", "arm", "seed"), ("fewer", "saved"))
    seeds, steps = (1, 30) if study.is_quick else (3, 900)
    try:
        for job in JOBS:
            for seed in range(seeds):
                measure(table, study, job, seed, steps)
    finally:
        report(table)


def measure(table: Table, study: Study, job: str, seed: int, steps: int) -> None:
    """Train the arms of a job from one seed."""
    if all(table.has(job, arm, seed) for arm in ARMS):
        return
    study.check_time()
    plain, plain_seconds = train(job, seed, steps)
    losses = np.array(plain.losses["averaged"])
    goal = losses[int(0.7 * len(losses)) :].mean()
    base = steps_to(goal, np.array(plain.steps), losses)
    for arm in ARMS:
        if table.has(job, arm, seed):
            continue
        study.check_time()
        other, seconds = train(job, seed, steps, **ARMS[arm]())
        own = steps_to(goal, np.array(other.steps), np.array(other.losses["averaged"]))
        # what never comes there needs at least all its steps
        fewer = base / (other.steps[-1] if math.isnan(own) else own)
        saved = fewer * plain_seconds / seconds
        table.add(job=job, arm=arm, seed=seed, fewer=fewer, saved=saved)


def report(table: Table) -> None:
    rows = []
    for job in JOBS:
        for arm in ARMS:
            found = [table.select(name, job=job, arm=arm) for name in ("fewer", "saved")]
            if not found[0]:
                continue
            pairs = [table.select(name, job=job, arm="pairs") for name in ("fewer", "saved")]
            more = [
                [a - b for a, b in zip(own, other, strict=False)]
                for own, other in zip(found, pairs, strict=True)
            ]
            cells = (interval(x, 2) if x else "" for x in (*found, *more))
            rows.append((job, arm, *cells))
    header = ("job", "arm", "times fewer steps", "times fewer processor seconds")
    print(markdown((*header, "steps, more than pairs", "seconds, more than pairs"), rows))


def train(job: str, seed: int, steps: int, **slots: object) -> tuple[HeldOutLoss, float]:
    """Return the held-out losses of a run, and the processor seconds of its training."""
    seed_everything(seed, verbose=False)
    module, data = WORKLOADS[job].build(**slots)
    held_out = TimedHeldOutLoss(steps // EVALUATIONS, repeats=1)
    callbacks = [EMAWeightAveraging(decay=0.98), held_out]
    started = time.process_time()
    Trainer(max_steps=steps, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    return held_out, time.process_time() - started - held_out.seconds
