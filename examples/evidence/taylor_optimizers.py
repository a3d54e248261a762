"""Does what a control variate gains depend on the optimizer? SGD beside Adam, small batches.

Eight Gaussians, an MLP, 32 draws a step, unit weight on the score at noise levels from 0.03 to 1.
Each arm and optimizer has the learning rate of two that is best for it.
Source: Jeha et al. 2024, arXiv 2408.12270: the choice of the optimizer impacts effectiveness.
"""

import json
import time
from functools import partial

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib.figure import Figure
from study import Study, Table, interval, markdown, mean_and_half

from lightning_vr import CARV, VE, DiffusionModule, ResidualMLP, TaylorCV, UnitWeighting
from lightning_vr.core.rng import generator
from lightning_vr.data import EightGaussians

ARMS = {
    "plain": (32, dict),
    "16 pairs": (16, lambda: {"draws": CARV(2, scope="none", antithetic=True)}),
    "order 0": (32, lambda: {"control_variate": control(0)}),
    "order 1": (32, lambda: {"control_variate": control(1)}),
}
RATES = {"SGD": (1e-2, 3e-2), "Adam": (1e-3, 3e-3)}
LEVEL, EVALUATIONS = 0.1, 20


def control(order: int) -> TaylorCV:
    return TaylorCV(order, gate="open", refit_every_n_steps=100)


def run(study: Study) -> None:
    keys = ("optimizer", "rate", "arm", "seed")
    table = Table(study.folder / "taylor_optimizers.csv", keys, ("error", "seconds", "curve"))
    seeds, steps = (1, 20) if study.is_quick else (3, 400)
    try:
        for seed in range(seeds):
            for optimizer, rates in RATES.items():
                for rate in rates:
                    for arm in ARMS:
                        if not table.has(optimizer, rate, arm, seed):
                            study.check_time()
                            found = trained(optimizer, rate, arm, seed, steps)
                            row = {"optimizer": optimizer, "rate": rate, "arm": arm, "seed": seed}
                            table.add(**row, **found)
    finally:
        report(table)
        draw(table, study, steps)


def report(table: Table) -> None:
    rows = []
    for optimizer, rates in RATES.items():
        for arm in ARMS:
            best = best_rate(table, optimizer, arm)
            if best is None:
                continue
            own = {"optimizer": optimizer, "arm": arm, "rate": best}
            found = table.select("error", **own)
            plain = table.select("error", **own | {"arm": "plain"} | best_of(table, optimizer))
            less = [a - b for a, b in zip(plain, found, strict=False)]
            others = [
                f"{mean_and_half(table.select('error', **own | {'rate': rate}))[0]:.2f}"
                for rate in rates
            ]
            seconds = interval(table.select("seconds", **own), 1)
            cells = (interval(found), interval(less), ", ".join(others), seconds)
            rows.append((optimizer, arm, f"{best:g}", *cells))
    header = ("optimizer", "arm", "best rate", f"error of the score at s = {LEVEL:g}")
    print(markdown((*header, "less than plain", "all rates", "processor seconds"), rows))


def best_of(table: Table, optimizer: str) -> dict[str, float | None]:
    return {"rate": best_rate(table, optimizer, "plain")}


def best_rate(table: Table, optimizer: str, arm: str) -> float | None:
    """Return the learning rate with the least mean error, or None if one was not tried."""
    means = {}
    for rate in RATES[optimizer]:
        found = table.select("error", optimizer=optimizer, rate=rate, arm=arm)
        if not found:
            return None
        means[rate] = mean_and_half(found)[0]
    return min(means, key=lambda rate: means[rate])


class Curve(Callback):
    """The error of the score at one noise level, in the course of training."""

    def __init__(self, data: EightGaussians, every: int) -> None:
        source = generator("optimizers")
        x0 = data.draw(4096, source)[0].float()
        self.xt = x0 + LEVEL * torch.randn(x0.shape, generator=source)
        self.mean = data.mixture.posterior_mean(self.xt, 1.0, LEVEL)
        self.every, self.errors, self.seconds = every, [], 0.0

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            begin = time.process_time()
            self.errors.append(self.error(module))
            self.seconds += time.process_time() - begin

    @torch.no_grad()
    def error(self, module: DiffusionModule) -> float:
        """Return ``E ‖s_hat - s‖² / E ‖s‖²`` of the score s."""
        t = module.schedule.time(torch.full((len(self.xt),), LEVEL))
        error = module.denoise(self.xt, t) - self.mean
        return float(error.square().sum() / (self.xt - self.mean).square().sum())


def trained(optimizer: str, rate: float, arm: str, seed: int, steps: int) -> dict[str, object]:
    """Return the error in the last quarter, the seconds of training and the errors on the way."""
    seed_everything(seed, verbose=False)
    batch_size, slots = ARMS[arm]
    module = DiffusionModule(
        ResidualMLP(2, width=64),
        schedule=VE(0.03, 1.0),
        prediction="score",
        weighting=UnitWeighting("score"),
        optimizer=partial(getattr(torch.optim, optimizer), lr=rate),
        **slots(),
    )
    data = EightGaussians(batch_size=batch_size, num_samples=16384)
    curve = Curve(data, max(1, steps // EVALUATIONS))
    started = time.process_time()
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[curve],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    seconds = time.process_time() - started - curve.seconds
    return {"error": end(curve.errors), "seconds": seconds, "curve": json.dumps(curve.errors)}


def end(errors: list[float]) -> float:
    """Return the mean of the last quarter: single errors go up and down."""
    return float(np.mean(errors[-EVALUATIONS // 4 :]))


def draw(table: Table, study: Study, steps: int) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, optimizer in zip(figure.subplots(1, 2, sharey=True), RATES, strict=True):
        for arm in ARMS:
            best = best_rate(table, optimizer, arm)
            own = {"optimizer": optimizer, "rate": str(best), "arm": arm}
            curves = [
                json.loads(row["curve"])
                for row in table.rows
                if all(row[name] == value for name, value in own.items())
            ]
            if not curves:
                continue
            mean = np.mean(curves, axis=0)
            at = steps // EVALUATIONS * np.arange(1, len(mean) + 1)
            axes.plot(at, mean, label=f"{arm}, rate {best:g}")
            axes.fill_between(at, np.min(curves, axis=0), np.max(curves, axis=0), alpha=0.15)
        axes.set_title(optimizer)
        axes.set_xlabel("steps")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"error of the score at s = {LEVEL:g}")
    figure.savefig(study.folder / "taylor_optimizers.png", dpi=64)
