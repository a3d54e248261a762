"""How often the 95 % intervals of an audit hold what very many repetitions give.

Two tiny jobs are audited over and over with other batches and draws, at the least number of
repetitions, and with ten in the second look, as the default budget gives on the digits. Steps take
the seconds of a simulated machine, so that the true ratio of times is known: so many for each row,
times log-normal noise.

    python examples/audit/coverage.py --audits 200

The results are in ``runs/audit_coverage``; a study that was stopped goes on there.
"""

import argparse
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from lightning_vr import CARV, STF, VE, Candidate, DiffusionModule, ResidualMLP, audit
from lightning_vr.auditing import measurement as measuring
from lightning_vr.auditing.least_repetitions import LEAST_REPETITIONS
from lightning_vr.auditing.result import Audit
from lightning_vr.core import devices
from lightning_vr.data import EightGaussians, TwoGaussians

REPETITIONS = {"least": LEAST_REPETITIONS, "ten": (3, 10)}
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


def coverage(job: str, kind: str, audits: int, path: Path, truth: dict) -> None:
    """Store which intervals of each candidate hold the truth, after each twenty audits."""
    stored = json.loads(path.read_text()) if path.exists() else {"audits": 0, "found": {}}
    found = {name: defaultdict(list, columns) for name, columns in stored["found"].items()}
    with repetitions(*REPETITIONS[kind]):
        for seed in range(stored["audits"], audits):
            for each in one_audit(job, seed, candidates()).estimators[1:]:
                columns = found.setdefault(each.name, defaultdict(list))
                columns["second look"].append(each.is_finalist)
                for name in MEASURES:
                    interval, value = getattr(each, name), truth[each.name][name][0]
                    columns[name].append(interval.low <= value <= interval.high)
                    columns[f"{name} width"].append(math.log(interval.high / interval.low))
            if seed % 20 == 19 or seed == audits - 1:
                path.write_text(json.dumps({"audits": seed + 1, "found": found}))
                print(f"{job}, {kind}: {seed + 1} audits", flush=True)


def report(folder: Path) -> None:
    """Print how often intervals hold the truth, and the factor by which half of them reach."""
    print("| job | repetitions | candidate | intervals | RE holds | ECM holds | saving holds |")
    print("|---|---|---|---|---|---|---|")
    pooled: dict[str, list[bool]] = defaultdict(list)
    for path in sorted(folder.glob("*-*.json")):
        job, kind = path.stem.split("-")
        for name, columns in json.loads(path.read_text())["found"].items():
            count = len(columns["efficiency"])
            shares = [
                f"{100 * np.mean(columns[each]):.1f} % "
                f"(×{math.exp(np.median(columns[f'{each} width']) / 2):.2f})"
                for each in MEASURES
            ]
            print(f"| {job} | {kind} | {name} | {count} | {' | '.join(shares)} |")
            for each in MEASURES:
                pooled[f"{kind}, {each}"] += columns[each]
    for name, holds in pooled.items():
        print(f"{name}: {100 * np.mean(holds):.1f} % of {len(holds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, help="both if not given")
    parser.add_argument("--audits", type=int, default=200)
    parser.add_argument("--reference", type=int, default=1500, help="repetitions of the truth")
    parser.add_argument("--folder", type=Path, default=Path("runs/audit_coverage"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for job in [options.job] if options.job else JOBS:
        path = options.folder / f"{job}.json"
        if not path.exists():
            path.write_text(json.dumps(reference(job, options.reference)))
        truth = json.loads(path.read_text())
        for kind in REPETITIONS:
            stored = options.folder / f"{job}-{kind}.json"
            coverage(job, kind, options.audits, stored, truth)
    report(options.folder)


if __name__ == "__main__":
    main()
