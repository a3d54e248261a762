"""Train for long with every callback on and faults injected: does memory stay flat?

    python examples/reliability/soak.py --minutes 30

This trains ``configs/digits_stf.yaml`` with averaged weights, target and gradient variance, Fréchet
distance, sample grids and checkpoints, all far more often than usual. Meanwhile samples turn NaN,
the disk is full for checkpoints and pictures, and a logger raises. At the end it prints resident
memory at one third and at the end, and every warning.
"""

import argparse
import errno
import os
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

CONFIG = Path(__file__).parents[2] / "configs/digits_stf.yaml"
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
        if seconds > self.seconds:
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


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """Return the configuration of the digits with more frequent callbacks."""
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"]["on_nonfinite"] = "skip"
    trainer = config["trainer"] | {
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": CYCLE // 10,
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


def report(soak: Soak, seen: list[warnings.WarningMessage]) -> None:
    """Print memory, faults and warnings."""
    last, end = soak.memory[-1]
    third = next(megabytes for seconds, megabytes in soak.memory if seconds >= last / 3)
    print(f"{last / 60:.1f} minutes; injected: {dict(soak.faults)}")
    print(f"resident: {third:.0f} MB at one third, {end:.0f} MB at the end, {end / third - 1:+.1%}")
    for text, count in Counter(f"{w.category.__name__}: {w.message}" for w in seen).items():
        print(f"{count} x {text}")


def main() -> None:
    """Train with faults, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many, if sooner")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()

    soak, config = Soak(60 * given.minutes), settings(given.folder, given.steps)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cli = VRCLI(args={**config}, run=False)
        cli.trainer.callbacks.append(soak)
        cli.trainer.loggers = [CSVLogger(given.folder, name=""), FlakyLogger()]
        with (
            soak.fail_if_full(torch, "save", "checkpoints"),
            soak.fail_if_full(samples, "save_picture", "pictures"),
        ):
            cli.trainer.fit(cli.model, cli.datamodule)
    report(soak, list(seen))


if __name__ == "__main__":
    main()
