"""Whether what audits recommend comes true, on twelve small workloads.

Each workload trains plain for a quarter of its steps, and is audited there. What is recommended
then trains from the start, as does the plain estimator, over several seeds. Where nothing is
recommended, the finalist with the largest predicted saving trains all the same, to see whether the
audit was right not to. Compared is the compute (steps, times the seconds of a step that the audit
measured) to the held-out loss of the plain run's end, which is the mean over its last 30 %. The
loss is that of averaged weights: ``judged_loss.py`` says which, and why.

    python examples/audit/recommendations.py --list
    python examples/audit/recommendations.py --only gaussians_16 gaussians_256

On a machine that others use, ``--cpu-seconds`` takes those of this process for the seconds of steps
and of budgets: let it have one thread, with ``OMP_NUM_THREADS=1``.

The results are in ``runs/audit_recommendations``: what is in ``results.csv`` is not done again.
"""

import argparse
import csv
import json
import logging
import math
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml
from audit_against_training import EVALUATIONS, steps_to
from judged_loss import DECAY, LENGTH, JudgedLoss
from lightning.pytorch import Trainer, seed_everything
from workloads import QUIET, WORKLOADS

from lightning_vr import Audit, DiffusionModule, audit
from lightning_vr.auditing import measurement, save_report
from lightning_vr.auditing.candidates import read_candidates
from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.core import devices

JUDGES = {"realised": f"length {LENGTH:g}", "fixed_decay": f"decay {DECAY:g}"}
"""Columns of what came true, and the averages that they are judged by."""

COLUMNS = (
    "workload",
    "candidate",
    "is_recommended",
    "predicted",
    "low",
    "high",
    "noise_ratio",
    "time_ratio",
    "seed",
    *JUDGES,
)

LONGER = 1.5
"""Steps of the candidate's run over those of the plain one: it may be slower."""

AUDIT_SEED = 100


def train(
    name: str,
    seed: int,
    steps: int,
    every: int,
    goals: dict[str, float] | None = None,
    **slots: object,
) -> JudgedLoss:
    seed_everything(seed, verbose=False)
    module, data = WORKLOADS[name].build(**slots)
    held_out = JudgedLoss(every, repeats=4 if name.startswith("digits") else 1, goals=goals)
    Trainer(max_steps=steps, callbacks=[held_out], **QUIET).fit(module, datamodule=data)
    return held_out


def find_candidate(name: str, budget: float, fraction: float, folder: Path) -> dict:
    """Audit early in a plain run; return what may pay there, and what is expected of it."""
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    seed_everything(AUDIT_SEED, verbose=False)
    module: DiffusionModule
    module, data = WORKLOADS[name].build()
    steps = max(1, int(fraction * WORKLOADS[name].steps / 4))
    Trainer(max_steps=steps, **QUIET).fit(module, datamodule=data)
    found = audit(module, data, budget=budget, progress=False)
    save_report(found, folder / name)
    best = found.recommended or most_promising(found)
    summary = {
        "candidate": best.name,
        "is_recommended": found.recommended is not None,
        "config": best.config,
        "predicted": list(best.predicted_speedup),
        "noise_ratio": found.noise_ratio,
        "time_ratio": found.current.seconds / best.seconds,
        "advice": found.advice,
    }
    path.write_text(json.dumps(summary, indent=2))
    return summary


def most_promising(found: Audit) -> MeasuredEstimator:
    """Return the finalist with the largest predicted saving, or without any that candidate."""
    rivals = found.finalists or found.estimators[1:]
    # what is not resolved has NaN
    resolved = [each for each in rivals if each.predicted_speedup.estimate > 0]
    return max(resolved, key=lambda each: each.predicted_speedup.estimate)


def realised(name: str, seed: int, fraction: float, summary: dict, folder: Path) -> dict:
    """Return how many times less compute the candidate needs, with one seed, by each judge."""
    steps = max(EVALUATIONS, int(fraction * WORKLOADS[name].steps))
    every = steps // EVALUATIONS
    plain = train(name, seed, steps, every)
    path = folder / "candidate.yaml"
    path.write_text(yaml.safe_dump([{"name": summary["candidate"], **summary["config"]}]))
    (candidate,) = read_candidates(path)
    goals = plain.last_losses()
    other = train(name, seed, int(LONGER * steps), every, goals, **candidate.slots())
    return {
        column: fewer_steps(plain, other, judge, goals[judge]) * summary["time_ratio"]
        for column, judge in JUDGES.items()
    }


def fewer_steps(plain: JudgedLoss, other: JudgedLoss, judge: str, goal: float) -> float:
    """Return the plain run's steps to a loss over those of another run."""
    base, own = (
        steps_to(goal, np.array(run.steps), np.array(run.losses[judge])) for run in (plain, other)
    )
    # what never comes there is at least so much slower
    return base / (other.steps[-1] if math.isnan(own) else own)


def done(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, object]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def run(name: str, options: argparse.Namespace) -> None:
    if "lora" in name and find_spec("peft") is None:
        print(f"{name} is left out: it needs peft, as in `pip install lightning-vr[adapters]`.")
        return
    path = options.folder / "results.csv"
    known = {(row["workload"], row["seed"]) for row in done(path)}
    summary = find_candidate(name, options.budget, options.fraction, options.folder)
    print(f"{name}: {summary['advice']}", flush=True)
    row = {key: summary[key] for key in COLUMNS if key in summary} | {"workload": name}
    row |= zip(("predicted", "low", "high"), summary["predicted"], strict=True)
    for seed in range(options.seeds):
        if (name, str(seed)) in known:
            continue
        found = realised(name, seed, options.fraction, summary, options.folder)
        append(path, row | {"seed": seed} | found)
        text = ", ".join(f"{value:.2f} by {JUDGES[key]}" for key, value in found.items())
        print(f"{name}, seed {seed}: times less compute {text}", flush=True)


def report(path: Path) -> None:
    """Print a table of what was predicted and what came true, with standard errors."""
    judges = " | ".join(f"realised ± error, {judge}" for judge in JUDGES.values())
    print(
        f"| workload | noise over signal | candidate | recommended | predicted | {judges} | seeds |"
    )
    print("|---" * (6 + len(JUDGES)) + "|")
    rows = done(path)
    for name in WORKLOADS:
        own = [row for row in rows if row["workload"] == name]
        if not own:
            continue
        numbers = [float(own[0][key]) for key in ("predicted", "low", "high")]
        cells = [name, f"{float(own[0]['noise_ratio']):.2g}", own[0]["candidate"]]
        cells += ["yes" if own[0]["is_recommended"] == "True" else "no"]
        cells += ["{:.2f} ({:.2f} to {:.2f})".format(*numbers)]
        cells += [mean_and_error([float(row[key]) for row in own]) for key in JUDGES]
        print("| " + " | ".join([*cells, str(len(own))]) + " |")


def mean_and_error(savings: list[float]) -> str:
    """Return the geometric mean and its standard error."""
    logs = np.log(savings)
    mean = math.exp(logs.mean())
    error = mean * logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return f"{mean:.2f} ± {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the workloads and end")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, help="all if not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of an audit")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps of each workload")
    parser.add_argument("--cpu-seconds", action="store_true", help="as seconds of the audits")
    parser.add_argument("--folder", type=Path, default=Path("runs/audit_recommendations"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.only, options.fraction = ["gaussians_16"], 0.01
        options.seeds, options.budget = 1, 1.0
    if options.cpu_seconds:
        measurement.time = devices.time = SimpleNamespace(perf_counter=time.process_time)
    if options.list:
        print("\n".join(f"{name}: {job.steps} steps" for name, job in WORKLOADS.items()))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in options.only or WORKLOADS:
        run(name, options)
    report(options.folder / "results.csv")


if __name__ == "__main__":
    main()
