"""How often the 95 % intervals of an audit hold what very many repetitions give.

Two tiny jobs are audited over and over with other batches and draws, with ten repetitions in the
second look, about as many as the default budget gives on the digits. The first five of them are the
least that an audit takes, and say what it would find with those. Steps take the seconds of a
simulated machine, so that the true ratio of times is known: so many for each row, times log-normal
noise.

    python examples/audit/coverage.py --job two_gaussians --audits 200

All repetitions are kept in ``runs/audit_coverage``: a study that was stopped goes on there, and one
that is done says at once what other intervals would hold.
"""

import argparse
import functools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from lightning_vr import CARV, STF, VE, Candidate, DiffusionModule, ResidualMLP, audit
from lightning_vr.auditing import measurement as measuring
from lightning_vr.auditing.candidates import CURRENT
from lightning_vr.auditing.comparison import Comparison
from lightning_vr.auditing.least_repetitions import LEAST_REPETITIONS
from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.auditing.result import Audit
from lightning_vr.core import devices
from lightning_vr.data import EightGaussians, TwoGaussians
from lightning_vr.variance.components import Components

FIRST, LEAST = LEAST_REPETITIONS
MOST = 10
"""Repetitions of the second look, of which the first ones are the least that an audit takes."""

MEASURES = ("efficiency", "multiplier", "predicted_speedup")

ROW, NOISE = 1e-5, 0.05
"""Seconds of a row, and the deviation of the log of the seconds of a pass."""


class Machine:
    """Seconds that pass with the rows that a network takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.random = np.random.default_rng(0)

    def __call__(self) -> float:
        return self.now

    def work(self, rows: int) -> None:
        self.now += ROW * rows * math.exp(NOISE * self.random.standard_normal())


MACHINE = Machine()


class TimedMLP(nn.Module):
    """A small network whose passes take time on the simulated machine."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ResidualMLP(2, width=16, depth=1)
        nn.init.normal_(self.inner.project_out.weight, std=0.3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        MACHINE.work(len(x))
        return self.inner(x, t)


def eight_gaussians() -> tuple[DiffusionModule, EightGaussians]:
    module = DiffusionModule(TimedMLP(), sigma_data=1.0)
    return module, EightGaussians(batch_size=32, num_samples=1024, num_validation=32)


def two_gaussians() -> tuple[DiffusionModule, TwoGaussians]:
    module = DiffusionModule(TimedMLP(), schedule=VE(), sigma_data=1.0)
    return module, TwoGaussians(batch_size=16, dimension=2, num_samples=1024, num_validation=32)


JOBS: dict[str, Callable] = {"eight_gaussians": eight_gaussians, "two_gaussians": two_gaussians}


def candidates() -> list[Candidate]:
    return [
        Candidate("STF(64)", target=STF(64)),
        Candidate("strata", draws=CARV(1)),
        Candidate("pairs", draws=CARV(2, antithetic=True)),
    ]


def combinations() -> list[Candidate]:
    """Return what an audit of the candidates may combine."""
    target, *draws = candidates()
    return [Candidate(f"{target.name}, {c.name}", c.draws, target.target) for c in draws]


@contextmanager
def repetitions(first: int, second: int) -> Iterator[None]:
    """Let audits take so many repetitions, and steps the seconds of the simulated machine."""

    def of_all(seconds: list[float], *_: object) -> int:
        return len(seconds) - 1

    with (
        mock.patch.object(measuring, "affordable", of_all),
        mock.patch.object(measuring, "LEAST_REPETITIONS", (first, second)),
        mock.patch.object(devices, "time", SimpleNamespace(perf_counter=MACHINE)),
    ):
        yield


def one_audit(job: str, seed: int, rivals: list[Candidate]) -> Audit:
    """Audit the same weights on other batches, times and noise for each seed."""
    torch.manual_seed(0)
    module, data = JOBS[job]()
    module.seed = seed
    torch.manual_seed(seed)
    return audit(module, data, rivals, budget=1e-3, progress=False)


def reference(job: str, count: int) -> dict[str, dict[str, float]]:
    """Return what very many repetitions of all candidates give."""
    with (
        repetitions(count, 0),
        mock.patch.object(measuring, "finalists", return_value=[]),
    ):
        found = one_audit(job, 10**6, [*candidates(), *combinations()])
    return {
        each.name: {name: getattr(each, name) for name in MEASURES} for each in found.estimators[1:]
    }


class KeptLook(Comparison):
    """A look at candidates whose repetitions are kept."""

    kept: ClassVar[list["KeptLook"]] = []

    def __init__(self, module: DiffusionModule, batch: int) -> None:
        super().__init__(module, batch)
        self.kept.append(self)

    def repetitions(self) -> dict[str, list]:
        """Return the components and the seconds of each repetition, by estimator."""
        return {
            name: [
                (components[:, 0].tolist(), seconds)
                for components, seconds in zip(found.components, found.seconds, strict=True)
            ]
            for name, found in self._found.items()
        }


def run_audits(job: str, audits: int, path: Path) -> list:
    """Return the looks of so many audits, which are stored after each twenty."""
    stored = json.loads(path.read_text()) if path.exists() else []
    with repetitions(FIRST, MOST), mock.patch.object(measuring, "Comparison", KeptLook):
        for seed in range(len(stored), audits):
            KeptLook.kept.clear()
            one_audit(job, seed, candidates())
            stored.append([look.repetitions() for look in KeptLook.kept])
            if seed % 20 == 19 or seed == audits - 1:
                path.write_text(json.dumps(stored))
                print(f"{job}: {seed + 1} audits", flush=True)
    return stored[:audits]


@functools.cache
def built(job: str) -> tuple[DiffusionModule, Any]:
    return JOBS[job]()


def said(job: str, look: dict[str, list], count: int) -> dict[str, MeasuredEstimator]:
    """Return what the first repetitions of a look say of its candidates, by name."""
    module, data = built(job)
    known = {each.name: each for each in [*candidates(), *combinations()]}
    comparison = Comparison(module, data.batch_size)
    for name, rows in look.items():
        for components, seconds in rows[:count]:
            columns = torch.tensor(components, dtype=torch.float64)[:, None]
            comparison.add(known.get(name, Candidate(CURRENT)), Components(*columns), seconds)
    return {name: comparison.estimator(known[name]) for name in look if name in known}


class Coverage:
    """Counts how often intervals of each candidate hold the truth.

    Args:
        truth: Each measure of each candidate, by name.
    """

    def __init__(self, truth: dict) -> None:
        self.truth = truth
        self.columns: dict[str, dict] = defaultdict(lambda: defaultdict(list))

    def add(self, found: dict[str, MeasuredEstimator]) -> None:
        """Add intervals of candidates by name."""
        for each in found.values():
            columns = self.columns[each.name]
            for name in MEASURES:
                interval, value = getattr(each, name), self.truth[each.name][name][0]
                columns[name].append(interval.low <= value <= interval.high)
                columns[f"{name} width"].append(math.log(interval.high / interval.low))

    def report(self, job: str, count: int) -> None:
        """Print shares that hold, and the factor by which half of the intervals reach."""
        for name, found in self.columns.items():
            shares = [
                f"{100 * np.mean(found[each]):.1f} % "
                f"(×{math.exp(np.median(found[f'{each} width']) / 2):.2f})"
                for each in MEASURES
            ]
            intervals = len(found["efficiency"])
            print(f"| {job} | {count} | {name} | {intervals} | {' | '.join(shares)} |", flush=True)


def report(job: str, audits: list, truth: dict) -> None:
    """Print what audits with the least and with the most repetitions in the second look hold."""
    for count in (LEAST, MOST):
        coverage = Coverage(truth)
        for looks in audits:
            found: dict[str, MeasuredEstimator] = {}
            for look, repetitions in zip(looks, (FIRST, count), strict=False):
                found |= said(job, look, repetitions)
            coverage.add(found)
        coverage.report(job, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, help="both if not given")
    parser.add_argument("--audits", type=int, default=200)
    parser.add_argument("--reference", type=int, default=1500, help="repetitions of the truth")
    parser.add_argument("--folder", type=Path, default=Path("runs/audit_coverage"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.audits, options.reference = 1, 4
    options.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    jobs = [options.job] if options.job else list(JOBS)
    audits, truths = {}, {}
    for job in jobs:
        path = options.folder / f"{job}.json"
        if not path.exists():
            path.write_text(json.dumps(reference(job, options.reference)))
        truths[job] = json.loads(path.read_text())
        stored = options.folder / f"{job}-audits.json"
        audits[job] = run_audits(job, options.audits, stored)
    print("| job | repetitions | candidate | intervals | RE holds | ECM holds | saving holds |")
    print("|---|---|---|---|---|---|---|")
    for job in jobs:
        report(job, audits[job], truths[job])


if __name__ == "__main__":
    main()
