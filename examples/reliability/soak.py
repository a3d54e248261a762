"""Train for long with every callback on and faults injected: does memory stay flat?

    python examples/reliability/soak.py --minutes 30
    python examples/reliability/soak.py --minutes 30 --data points

This trains ``configs/digits_stf.yaml`` or ``configs/eight_gaussians.yaml`` with averaged weights,
target and gradient variance, Fréchet distance, sample grids and checkpoints, all far more often
than usual, and several loggers. Meanwhile samples turn NaN, the disk is full for checkpoints and
pictures, and a logger raises. At the end it prints resident memory, how fast it rose in the second
half of the run, and every kind of warning. It fails if memory rose by more than 0.3 MB a minute.
"""

import argparse
import errno
import os
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_vr.callbacks import sample_grid as samples
from lightning_vr.cli import VRCLI

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = {"digits": CONFIGS / "digits_stf.yaml", "points": CONFIGS / "eight_gaussians.yaml"}
STEEPEST = 0.3
"""MB a minute by which memory may rise in the second half of a run."""
PAGE = os.sysconf("SC_PAGE_SIZE")
CYCLE = 1000
"""Steps after which the faults repeat."""


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


class FlakyLogger(Logger):
    """Raises in some calls."""

    name, version = "flaky", 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls += 1
        if self.calls % (CYCLE // 10) == 0:
            raise ConnectionError("injected: no route to the logger")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters."""


class Soak(Callback):
    """Injects faults, records memory, and stops when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, 0.0
        self.memory: list[tuple[float, float]] = []
        self.faults: Counter[str] = Counter()
        self.is_full = False

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set a sample to NaN in some steps; let the disk be full for a while."""
        step = trainer.global_step
        if step % (CYCLE // 2) == CYCLE // 4:
            batch["image" if "image" in batch else "x0"][3] = torch.nan
            self.faults["NaN samples"] += 1
        self.is_full = 0.3 <= step % CYCLE / CYCLE < 0.42

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Record the memory, and stop in time."""
        seconds = time.monotonic() - self.start
        if trainer.global_step % (CYCLE // 50) == 0:
            self.memory.append((seconds, resident()))
        # a run whose last checkpoint is lost would end with an error
        if seconds > self.seconds and trainer.global_step % CYCLE > CYCLE / 2:
            trainer.should_stop = True

    def fail_if_full(self, module: ModuleType, function: str, what: str) -> Any:
        """Return a context in which a module's function raises while the disk is full."""
        real = getattr(module, function)

        def write(*args: Any, **kwargs: Any) -> Any:
            if self.is_full:
                self.faults[what] += 1
                raise OSError(errno.ENOSPC, "injected: no space left on device")
            return real(*args, **kwargs)

        return mock.patch.object(module, function, write)


def settings(folder: Path, steps: int, data: str) -> dict[str, Any]:
    """Return the configuration of the digits, or of points, with more frequent callbacks."""
    config = yaml.safe_load(DATA[data].read_text())
    config["model"]["init_args"]["on_nonfinite"] = "skip"
    trainer = config["trainer"] | {
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": CYCLE // 10,
        "limit_val_batches": 2,
    }
    trainer |= {"default_root_dir": str(folder), "logger": False, "enable_progress_bar": False}
    often = {
        "GradientVariance": {"every_n_steps": CYCLE // 50},
        "ModelCheckpoint": {
            "dirpath": str(folder / "checkpoints"),
            "every_n_train_steps": CYCLE // 20,
            "save_top_k": 1,
        },
    }
    for callback in trainer["callbacks"]:
        changes = often.get(callback["class_path"], {})
        callback["init_args"] = callback.get("init_args", {}) | changes
    config["trainer"] = trainer
    return config


def slope(memory: list[tuple[float, float]]) -> float:
    """Return by how many MB a minute memory rose in the second half, by least squares."""
    half = [pair for pair in memory if pair[0] >= memory[-1][0] / 2]
    seconds, megabytes = torch.tensor(half, dtype=torch.float64).T
    seconds = seconds - seconds.mean()
    return 60 * float(seconds @ megabytes / (seconds @ seconds).clamp(min=1e-9))


def report(soak: Soak, seen: Counter[str]) -> float:
    """Print memory, faults and warnings, and return how fast memory rose."""
    last, end = soak.memory[-1]
    half = next(megabytes for seconds, megabytes in soak.memory if seconds >= last / 2)
    rise = slope(soak.memory)
    print(f"{last / 60:.1f} minutes; injected: {dict(soak.faults)}")
    print(f"resident: {half:.1f} MB in the middle, {end:.1f} MB at the end")
    print(f"slope of the second half: {rise:+.2f} MB a minute")
    for text, count in seen.items():
        print(f"{count} x {text}")
    return rise


def main() -> None:
    """Train with faults, then report.

    Raises:
        SystemExit: With status 1 if memory rose too fast.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--data", choices=[*DATA], default="digits")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many, if sooner")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.steps = 30

    soak = Soak(60 * given.minutes)
    config = settings(given.folder, given.steps, given.data)
    seen: Counter[str] = Counter()

    def count(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # kinds of warnings are few; each step and each file has its own text
        seen[f"{category.__name__}: {re.sub(r'[0-9]+', 'N', str(message))}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        cli = VRCLI(args={**config}, run=False)
        cli.trainer.callbacks.append(soak)
        loggers = [CSVLogger(given.folder, name=name) for name in ("", "second")]
        cli.trainer.loggers = [*loggers, FlakyLogger()]
        with (
            soak.fail_if_full(torch, "save", "checkpoints"),
            soak.fail_if_full(samples, "save_picture", "pictures"),
        ):
            cli.trainer.fit(cli.model, cli.datamodule)
    # the first minutes fill caches: a run that `steps` ends is too short to tell
    if report(soak, seen) > STEEPEST and given.steps < 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
