"""A long run of the digits with every callback on and faults injected: does memory stay flat?

    python examples/soak.py --minutes 30

Trains `configs/digits_stf.yaml` for so many minutes with averaged weights, target and gradient
variance, Fréchet distance, sample grids and checkpoints, all far more often than anyone would. On
the way a sample turns NaN, the disk is full for a checkpoint and a picture, and a logger raises.
Prints resident memory at one third and at the end, and every warning that came.
"""

import argparse
import errno
import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_vr.callbacks import samples
from lightning_vr.cli import VRCLI

CONFIG = Path(__file__).parent.parent / "configs/digits_stf.yaml"
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


class FlakyLogger(Logger):
    """Raises at every hundredth number."""

    name, version = "flaky", 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls += 1
        if self.calls % 100 == 0:
            raise ConnectionError("injected: no route to the logger")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Take nothing."""


class Soak(Callback):
    """Injects faults, keeps track of memory, and stops when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.start = time.monotonic()
        self.memory: list[tuple[float, float]] = []
        self.faults: Counter[str] = Counter()
        self.is_full = False

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Spoil a sample now and then; fill the disk for a while."""
        if trainer.global_step % 500 == 250:
            batch["image"][3] = torch.nan
            self.faults["spoilt samples"] += 1
        self.is_full = 300 <= trainer.global_step % 1000 < 420

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read the memory, and stop in time."""
        if trainer.global_step % 20 == 0:
            self.memory.append((time.monotonic() - self.start, resident()))
        if time.monotonic() > self.end:
            trainer.should_stop = True

    def fail_if_full(self, function: Any, what: str) -> Any:
        """Return a function that raises while the disk is full."""

        def write(*args: Any, **kwargs: Any) -> Any:
            if self.is_full:
                self.faults[what] += 1
                raise OSError(errno.ENOSPC, "injected: no space left on device")
            return function(*args, **kwargs)

        return write


def settings(folder: Path) -> dict[str, Any]:
    """Return the digits' configuration, with everything more often."""
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"]["on_nonfinite"] = "skip"
    trainer = config["trainer"] | {"max_steps": -1, "max_epochs": -1, "val_check_interval": 100}
    trainer |= {"default_root_dir": str(folder), "logger": False, "enable_progress_bar": False}
    for callback in trainer["callbacks"]:
        if callback["class_path"] == "GradientVariance":
            callback["init_args"]["every_n_steps"] = 20
        if callback["class_path"] == "ModelCheckpoint":
            callback["init_args"] |= {"dirpath": str(folder / "checkpoints")}
            callback["init_args"] |= {"every_n_train_steps": 50, "save_top_k": 1}
    config["trainer"] = trainer
    return config


def report(soak: Soak, seen: list[warnings.WarningMessage]) -> None:
    """Print memory, faults and warnings."""
    last = soak.memory[-1][0]

    def mean(start: float, stop: float) -> float:
        part = [mb for at, mb in soak.memory if start * last <= at <= stop * last]
        return sum(part) / len(part)

    third, end = mean(0.32, 0.35), mean(0.97, 1.0)
    print(f"{last / 60:.1f} minutes; injected: {dict(soak.faults)}")
    print(f"resident: {third:.0f} MB at one third, {end:.0f} MB at the end, {end / third - 1:+.1%}")
    for text, count in Counter(f"{w.category.__name__}: {w.message}" for w in seen).items():
        print(f"{count} x {text}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()

    soak, config = Soak(60 * given.minutes), settings(given.folder)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cli = VRCLI(args={**config}, run=False)
        cli.trainer.callbacks.append(soak)
        cli.trainer.loggers = [CSVLogger(given.folder, name=""), FlakyLogger()]
        torch.save = soak.fail_if_full(torch.save, "checkpoints")
        samples.save_picture = soak.fail_if_full(samples.save_picture, "pictures")
        cli.trainer.fit(cli.model, cli.datamodule)
    report(soak, list(seen))


if __name__ == "__main__":
    main()
