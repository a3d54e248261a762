"""Whether what audits recommend comes true, on twelve small workloads.

Each workload trains plain for a quarter of its steps, and is audited there. What is recommended
then trains from the start, as does the plain estimator, over several seeds. Compared is the compute
(steps, times the seconds of a step that the audit measured) to the held-out loss of the plain run's
end, which is the mean over its last 30 %. Nothing is trained where nothing is recommended.

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
from audit_against_training import EVALUATIONS, HeldOutLoss, steps_to
from lightning.pytorch import Trainer, seed_everything
from workloads import QUIET, WORKLOADS

from lightning_vr import EMA, DiffusionModule, audit
from lightning_vr.auditing import measurement, save_report
from lightning_vr.auditing.candidates import read_candidates
from lightning_vr.core import devices

COLUMNS = (
    "workload",
    "recommended",
    "predicted",
    "low",
    "high",
    "noise_ratio",
    "time_ratio",
    "seed",
    "realised",
)

LONGER = 1.5
"""Steps of the recommended run over those of the plain one: it may be slower."""

AUDIT_SEED = 100


def train(name: str, seed: int, steps: int, every: int, **slots: object) -> HeldOutLoss:
    seed_everything(seed, verbose=False)
    module, data = WORKLOADS[name].build(**slots)
    held_out = HeldOutLoss(every, repeats=4 if name.startswith("digits") else 1)
    callbacks = [EMA(decay=0.98), held_out]
    Trainer(max_steps=steps, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    return held_out


def recommend(name: str, budget: float, fraction: float, folder: Path) -> dict:
    """Audit early in a plain run; return what is recommended, and what is expected of it."""
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
    best = found.recommended
    summary = {"recommended": None, "noise_ratio": found.noise_ratio, "advice": found.advice}
    if best is not None:
        summary |= {
            "recommended": best.name,
            "config": best.config,
            "predicted": list(best.predicted_speedup),
            "time_ratio": found.current.seconds / best.seconds,
        }
    path.write_text(json.dumps(summary, indent=2))
    return summary


def realised(name: str, seed: int, fraction: float, summary: dict, folder: Path) -> float:
    """Return how many times less compute what is recommended needs, with one seed."""
    steps = max(EVALUATIONS, int(fraction * WORKLOADS[name].steps))
    every = steps // EVALUATIONS
    plain = train(name, seed, steps, every)
    path = folder / "candidate.yaml"
    path.write_text(yaml.safe_dump([{"name": summary["recommended"], **summary["config"]}]))
    (candidate,) = read_candidates(path)
    other = train(name, seed, int(LONGER * steps), every, **candidate.slots())

    losses, fewer = np.array(plain.losses["averaged"]), np.array(other.losses["averaged"])
    goal = losses[int(0.7 * len(losses)) :].mean()
    base = steps_to(goal, np.array(plain.steps), losses)
    own = steps_to(goal, np.array(other.steps), fewer)
    # what never comes there is at least so much slower
    own = other.steps[-1] if math.isnan(own) else own
    return base / own * summary["time_ratio"]


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
    summary = recommend(name, options.budget, options.fraction, options.folder)
    print(f"{name}: {summary['advice']}", flush=True)
    row = {"workload": name, "noise_ratio": summary["noise_ratio"]}
    if summary["recommended"] is None:
        if (name, "") not in known:
            append(path, row | {"recommended": "", "seed": ""})
        return
    predicted, low, high = summary["predicted"]
    row |= {"recommended": summary["recommended"], "predicted": predicted, "low": low, "high": high}
    for seed in range(options.seeds):
        if (name, str(seed)) in known:
            continue
        found = realised(name, seed, options.fraction, summary, options.folder)
        append(path, row | {"time_ratio": summary["time_ratio"], "seed": seed, "realised": found})
        print(f"{name}, seed {seed}: {found:.2f} times less compute", flush=True)


def report(path: Path) -> None:
    """Print a table of what was predicted and what came true, with standard errors."""
    print("| workload | noise over signal | recommended | predicted | realised ± error | seeds |")
    print("|---|---|---|---|---|---|")
    rows = done(path)
    for name in WORKLOADS:
        own = [row for row in rows if row["workload"] == name]
        if not own:
            continue
        noise = f"{float(own[0]['noise_ratio']):.2g}"
        if not own[0]["recommended"]:
            print(f"| {name} | {noise} | nothing | | | |")
            continue
        logs = np.log([float(row["realised"]) for row in own])
        mean = math.exp(logs.mean())
        error = mean * logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
        low, high = float(own[0]["low"]), float(own[0]["high"])
        print(
            f"| {name} | {noise} | {own[0]['recommended']} | {float(own[0]['predicted']):.2f} "
            f"({low:.2f} to {high:.2f}) | {mean:.2f} ± {error:.2f} | {len(own)} |"
        )


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
