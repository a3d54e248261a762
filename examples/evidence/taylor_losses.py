"""Loss curves with a control variate on MNIST: a U-Net of 2 million parameters, SGD and Adam.

EDM, small batches. The held-out loss is that of averaged weights, on images and noise that are the
same for all. Models of one seed start alike; differences between them are taken in pairs.
Source: Jeha et al. 2024, arXiv 2408.12270: less variance on MNIST, and no better loss.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from study import Study, Table, interval, markdown
from taylor_mnist import unet

from lightning_vr import EMA, DiffusionModule, TaylorCV
from lightning_vr.data import ImageFolder
from lightning_vr.lifecycle.weight_averaging import averaged_weights

sys.path.append(str(Path(__file__).parents[1] / "audit"))

from audit_against_training import HeldOutLoss

ARMS = {"plain": dict, "order 0": lambda: {"control_variate": control()}}
RATES = {"SGD": 0.03, "Adam": 1e-3}
EVALUATIONS = 5


def control() -> TaylorCV:
    return TaylorCV(gate="open", refit_every_n_steps=50)


class Curve(HeldOutLoss):
    """Of the averaged weights alone; knows the processor seconds of training so far."""

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        super().on_train_start(trainer, module)
        self.began, self.seconds = time.process_time(), []

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        if trainer.global_step % self.every:
            return
        now = time.process_time()
        self.steps.append(trainer.global_step)
        self.seconds.append(now - self.began)
        with averaged_weights(trainer, module):
            self.losses["averaged"].append(self.measure(module))
        self.began += time.process_time() - now


def run(study: Study) -> None:
    path = study.images("mnist")
    if path is None:
        return
    keys = ("optimizer", "arm", "seed")
    table = Table(study.folder / "taylor_losses.csv", keys, ("steps", "seconds", "losses"))
    seeds, steps = (1, 2) if study.is_quick else (3, 60)
    batch, channels = (2, [8, 8, 16]) if study.is_quick else (16, [16, 32, 128])
    data = ImageFolder(path, 28, batch, channels=1, validation_fraction=0.02)
    try:
        for seed in range(seeds):
            for optimizer in RATES:
                for arm in ARMS:
                    if not table.has(optimizer, arm, seed):
                        study.check_time()
                        curve = train(optimizer, arm, seed, steps, data, channels)
                        lists = (curve.steps, curve.seconds, curve.losses["averaged"])
                        written = map(json.dumps, lists)
                        values = dict(zip(("steps", "seconds", "losses"), written, strict=True))
                        table.add(optimizer=optimizer, arm=arm, seed=seed, **values)
    finally:
        report(table)
        draw(table, study)


def train(
    optimizer: str, arm: str, seed: int, steps: int, data: ImageFolder, channels: list[int]
) -> Curve:
    seed_everything(seed, verbose=False)
    module = DiffusionModule(
        unet(channels),
        sigma_data=0.6,
        optimizer=partial(getattr(torch.optim, optimizer), lr=RATES[optimizer]),
        **ARMS[arm](),
    )
    curve = Curve(max(1, steps // EVALUATIONS), repeats=1)
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[EMA(decay=0.95), curve],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    return curve


def curves(table: Table, optimizer: str, arm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, seconds and losses ``(seeds, evaluations)``."""
    rows = [r for r in table.rows if r["optimizer"] == optimizer and r["arm"] == arm]
    steps, seconds, losses = (
        np.array([json.loads(r[name]) for r in rows]) for name in ("steps", "seconds", "losses")
    )
    return steps, seconds, losses


def report(table: Table) -> None:
    rows = []
    for optimizer in RATES:
        _, plain_seconds, plain = curves(table, optimizer, "plain")
        for arm in ARMS:
            _, seconds, losses = curves(table, optimizer, arm)
            pairs = [*zip(seconds, losses, plain_seconds, plain, strict=False)]
            if not pairs:
                continue
            less = [b[-1] - a[-1] for _, a, _, b in pairs]
            at_time = [b[-1] - np.interp(end[-1], own, a) for own, a, end, b in pairs]
            cells = (interval(losses[:, -1], 4), interval(less, 4), interval(at_time, 4))
            rows.append((optimizer, arm, *cells, interval(seconds[:, -1], 1)))
    header = ("optimizer", "arm", "held-out loss", "less than plain", "at equal time")
    print(markdown((*header, "processor seconds"), rows))


def draw(table: Table, study: Study) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, optimizer in zip(figure.subplots(1, 2), RATES, strict=True):
        for arm in ARMS:
            steps, _, losses = curves(table, optimizer, arm)
            if len(losses):
                low, high = losses.min(axis=0), losses.max(axis=0)
                axes.plot(steps[0], losses.mean(axis=0), "o-", label=arm)
                axes.fill_between(steps[0], low, high, alpha=0.15)
        axes.set_title(f"{optimizer}, rate {RATES[optimizer]:g}")
        axes.set_xlabel("steps")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss, mean and range of seeds")
    figure.savefig(study.folder / "taylor_losses.png", dpi=80)
