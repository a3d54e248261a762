"""Where the noise of an adapter's gradients comes from, and what removing it gives.

    python examples/adapters/audit_adapters.py

begins with the network of ``adapt_digits.py``. For batch sizes 1 to 4 it audits an adapter halfway
through its training. Then it trains, for the same compute, with the plain estimator, with the one
of the largest multiplier in that audit, and with the one of the smallest. ``runs/adapters`` gets
the audits, ``audits.json`` and ``trained.json``.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from adapt_digits import NEW, adapted, held_out_loss, train_base, trainer
from lightning.pytorch import Callback, Trainer, seed_everything
from named_digits import NamedDigits

from lightning_vr import GradientVariance, audit
from lightning_vr.auditing import Candidate, save_report
from lightning_vr.auditing.default_candidates import default_candidates
from lightning_vr.data import Digits

DECAY = 0.97
"""Of the averaged weights, the same for all numbers of steps."""

ARMS = ("plain", "best", "rejected")


def halfway(base: Path, batch: int, steps: int) -> tuple[NamedDigits, Digits]:
    """Return an adapter after half of its training with the plain estimator, and its data."""
    seed_everything(100, verbose=False)
    module, data = adapted(base), Digits(batch, classes=NEW)
    trainer(steps // 2, decay=DECAY).fit(module, data)
    return module, data


def candidates(module: NamedDigits, data: Digits) -> list[Candidate]:
    """Return the package's own, without proposals that batches of 1 teach too little."""
    data.setup()
    found = default_candidates(module, len(data.train_dataset))
    return [candidate for candidate in found if "learned" not in candidate.name]


def audit_batch(base: Path, batch: int, steps: int, budget: float, folder: Path) -> dict[str, Any]:
    """Audit one batch size, and return what training needs to know of it."""
    module, data = halfway(base, batch, steps)
    listed = candidates(module, data)
    found = audit(module, data, listed, budget=budget)
    save_report(found, folder / f"audit_{batch}")
    # not those that the audit combines of them
    named = {candidate.name for candidate in listed}
    rivals = [each for each in found.estimators[1:] if each.name in named]
    ranked = sorted(rivals, key=lambda each: each.multiplier.estimate)
    chosen = {"plain": found.current, "best": ranked[-1], "rejected": ranked[0]}
    rows = {
        arm: {
            "name": each.name,
            "multiplier": list(each.multiplier),
            "efficiency": list(each.efficiency),
            "predicted_speedup": list(each.predicted_speedup),
            "seconds": each.seconds,
        }
        for arm, each in chosen.items()
    }
    parts = {n: float(x[0]) for n, x in found.current.components._asdict().items()}
    return {"arms": rows, "noise_ratio": found.noise_ratio, "parts": parts, "advice": found.advice}


class Seconds(Callback):
    """Times the steps of a run, in seconds of the processor: other work does not count."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: object) -> None:
        self.ends.append(time.process_time())

    @property
    def of_a_step(self) -> float:
        return float(np.median(np.diff(self.ends)))


def train_arm(
    base: Path, batch: int, name: str, steps: int, seed: int, *callbacks: Callback
) -> NamedDigits:
    """Return an adapter that was trained with an estimator of the audit."""
    seed_everything(seed, verbose=False)
    module, data = adapted(base), Digits(batch, classes=NEW)
    listed = candidates(module, data)
    chosen = next((each for each in listed if each.name == name), Candidate("current"))
    for slot, value in chosen.slots().items():
        setattr(module, slot, value)
    trainer(steps, *callbacks, decay=DECAY).fit(module, data)
    return module


def train_arms(
    base: Path, batch: int, found: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Train each arm for the compute that the plain one needs for its steps."""
    names = {arm: found["arms"][arm]["name"] for arm in ARMS}
    seconds = {}
    for arm, name in names.items():
        clock = Seconds()
        train_arm(base, batch, name, 2 * options.timed_steps, 0, clock)
        seconds[arm] = clock.of_a_step
    rows = {}
    for arm, name in names.items():
        own = max(1, round(options.steps * seconds["plain"] / seconds[arm]))
        runs = [train_arm(base, batch, name, own, seed) for seed in range(options.seeds)]
        losses = [held_out_loss(module, NEW) for module in runs]
        rows[arm] = {"name": name, "steps": own, "seconds": seconds[arm], "losses": losses}
        print(f"batch {batch}, {arm}, {rows[arm]}", flush=True)
    return rows


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print mean losses, and differences from the plain estimator in pairs of seeds."""
    for batch, arms in rows.items():
        plain = np.array(arms["plain"]["losses"])
        for arm in ARMS:
            losses = np.array(arms[arm]["losses"])
            difference = losses - plain
            errors = [x.std(ddof=1) / len(x) ** 0.5 for x in (losses, difference)]
            print(
                f"batch {batch}, {arms[arm]['name']}: {arms[arm]['steps']} steps, "
                f"{losses.mean():.4f} ± {errors[0]:.4f}, "
                f"from plain {difference.mean():+.4f} ± {errors[1]:.4f}"
            )


def measuring_seconds(base: Path, batch: int, steps: int) -> dict[str, float]:
    """Return the CPU seconds of one measurement of ``GradientVariance`` beside those of a step."""
    found = {}
    for name in ("adapter", "network"):
        for every in (None, 1):
            seed_everything(0, verbose=False)
            module = adapted(base) if name == "adapter" else adapted(base, adapter=None)
            clock = Seconds()
            watch = [] if every is None else [GradientVariance(every_n_steps=every)]
            fit: Trainer = trainer(steps, *watch, clock, decay=DECAY)
            fit.fit(module, Digits(batch, classes=NEW))
            what = "step" if every is None else "step with measurement"
            found[f"{name}, {what}"] = clock.of_a_step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--only", choices=("audit", "training"), help="both if not given")
    parser.add_argument("--trained", type=int, nargs="*", default=[1, 4], help="batch sizes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of each audit")
    parser.add_argument("--timed_steps", type=int, default=10)
    parser.add_argument("--base_steps", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.batch_sizes = options.trained = [1]
        options.base_steps, options.steps, options.timed_steps = 2, 4, 2
        options.seeds, options.budget = 2, 1.0
    base, saved = options.folder / "base", options.folder / "audits.json"
    if not base.exists():
        train_base(base, options.base_steps)
    if options.only != "training":
        print(json.dumps(measuring_seconds(base, 4, options.timed_steps)))
        audit_of = functools.partial(audit_batch, base, steps=options.steps, budget=options.budget)
        audits = {str(n): audit_of(n, folder=options.folder) for n in options.batch_sizes}
        saved.write_text(json.dumps(audits, indent=2))
    audits = json.loads(saved.read_text())
    for batch, found in audits.items():
        print(f"batch {batch}: {found['advice']}")
    if options.only != "audit":
        trained = {n: train_arms(base, n, audits[str(n)], options) for n in options.trained}
        (options.folder / "trained.json").write_text(json.dumps(trained, indent=2))
        report(trained)


if __name__ == "__main__":
    main()
