"""Measure what pairs and control variates gain where batches are small and low noise dominates.

    python examples/control_variates/taylor_small_batches.py

An MLP learns the score of points in the plane from 32 draws a step. With unit weight on the error
of the score, whose target is ``-ε / σ``, and noise levels from 0.002 to 1, nearly all of the
gradient is the noise of the lowest levels. This is the setting of Jeha, Grathwohl, Andersen, Ek and
Frellsen 2024, arXiv 2408.12270. With unit weight on ε, as usual, noise of all levels counts alike.
Results in 2000 steps, two seeds:

* With weight on the score, plain training learns almost nothing below noise 0.3, and with batches
  of 64 hardly more. Pairs of opposite noise and all orders learn.
* 16 pairs, which cost nothing, give most of the gain. 32 pairs take as many passes through the
  network as order 0, and are as good or better: there is little reason for order 0.
* Order 1 learns eight Gaussians still better, at 4 times the time of a plain step. Order 2 is no
  better than order 1, at 10 times.
* A coefficient of 1 below noise 0.3 does as well as fitted ones: only low noise matters.
* The gate opens, and then does what an open one does.
* With weight on ε all arms end within a tenth of each other, and 32 pairs are best.

It takes ten minutes on one thread. The results are in ``runs/taylor_small_batches``.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_vr import (
    CARV,
    VE,
    DiffusionModule,
    References,
    ResidualMLP,
    TaylorCV,
    UnitWeighting,
    posterior_mean,
)
from lightning_vr.data import Checkerboard, EightGaussians, Moons

SETS = {"eight Gaussians": EightGaussians, "moons": Moons, "checkerboard": Checkerboard}

WORKLOADS = [*((name, "score") for name in SETS), ("eight Gaussians", "epsilon")]
"""A set, and the prediction whose error has unit weight at all noise levels, log-uniform."""

LEVELS = (0.03, 0.1, 0.3)
"""Noise levels at which the score is compared with the exact one."""

SHOWN = 0.1
"""The noise level whose curves are drawn."""

POINTS = 1 << 16
"""Size of a training set, so large that its own score is nearly that of the density."""

EVALUATIONS = 10

WIDTH = 64

SLOW = ("order 1", "order 2")
"""Arms that only the first workload has: their steps take several times as long."""


def pairs() -> dict[str, Any]:
    return {"draws": CARV(2, scope="none", antithetic=True)}


def control(order: int, **settings: Any) -> dict[str, Any]:
    return {"control_variate": TaylorCV(order, refit_every_n_steps=100, **settings)}


ARMS: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
    "plain": (32, dict),
    "plain, batch 64": (64, dict),
    "16 pairs": (16, pairs),
    "32 pairs": (32, pairs),
    "order 0": (32, partial(control, 0, gate="open")),
    "order 1": (32, partial(control, 1, gate="open")),
    "order 2": (32, partial(control, 2, gate="open")),
    "order 0, 1 below 0.3": (32, partial(control, 0, gate=(0.0, 0.3), coefficient=1.0)),
    "order 0, gate": (32, partial(control, 0)),
}
"""Batch size and contents of the module's slots."""


class Truth:
    """Noised points of a validation set and their exact posterior means under the training set."""

    def __init__(self, name: str, size: int) -> None:
        data = SETS[name](num_samples=size)
        data.setup("fit")
        train, held_out = (loader.dataset for loader in loaders(data))
        references = References.prepare(points(train))
        x0 = points(held_out)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        self.noised = {level: x0 + level * noise for level in LEVELS}
        self.means = {s: posterior_mean(x, 1.0, s, references).mean for s, x in self.noised.items()}

    @torch.no_grad()
    def errors(self, module: DiffusionModule) -> list[float]:
        """Return ``E ‖s_hat - s‖² / E ‖s‖²`` of the score s at each noise level."""
        found = []
        for level in LEVELS:
            xt, mean = self.noised[level], self.means[level]
            t = module.schedule.time(torch.full((len(xt),), level))
            error = module.denoise(xt, t) - mean
            found.append(float(error.square().sum() / (xt - mean).square().sum()))
        return found


class History(Callback):
    """Errors during training, and the fraction of draws for which a control variate runs."""

    def __init__(self, truth: Truth, every: int) -> None:
        self.truth, self.every = truth, every
        self.steps: list[int] = []
        self.errors: list[list[float]] = []
        self.fractions: list[float] = []
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        if trainer.global_step % self.every:
            return
        begin = time.process_time()
        self.steps.append(trainer.global_step)
        self.errors.append(self.truth.errors(module))
        if isinstance(module.control_variate, TaylorCV):
            fit = module.control_variate.fit
            self.fractions.append(float(fit.fractions[fit.is_open].sum()))
        self.seconds += time.process_time() - begin


def loaders(data: Any) -> tuple[Any, Any]:
    return data.train_dataloader(), data.val_dataloader()


def points(dataset: Any) -> Tensor:
    return torch.stack([dataset[i]["x0"] for i in range(len(dataset))])


def train(
    options: argparse.Namespace, workload: tuple[str, Any], arm: str, truth: Truth, seed: int
) -> dict:
    """Train one arm and return its errors, seconds and open fraction."""
    seed_everything(seed, verbose=False)
    batch_size, slots = ARMS[arm]
    name, weight = workload
    module = DiffusionModule(
        ResidualMLP(2, width=WIDTH, depth=options.depth),
        schedule=VE(0.002, 1.0),
        prediction=weight,
        weighting=UnitWeighting(weight),
        optimizer=partial(torch.optim.Adam, lr=options.rate),
        lr_scheduler=partial(CosineAnnealingLR, T_max=options.steps),
        **slots(),
    )
    data = SETS[name](batch_size=batch_size, num_samples=options.size)
    history = History(truth, options.steps // EVALUATIONS)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        callbacks=[history],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - begin - history.seconds
    fraction = statistics.mean(history.fractions) if arm.endswith("gate") else None
    return {
        "workload": list(workload),
        "arm": arm,
        "seed": seed,
        "steps": history.steps,
        "errors": history.errors,
        "seconds": seconds,
        "open": fraction,
    }


def report(runs: list[dict], workload: tuple[str, str]) -> None:
    """Print the errors of each arm at the end, mean and range over seeds."""
    print(f"\n{workload[0]}, unit weight on {workload[1]}: error of the score, mean ± half range")
    print(f"{'':22}" + "".join(f"{f's = {s:g}':>15}" for s in LEVELS) + "    CPU ms/step   open")
    for arm in ARMS:
        own = [r for r in runs if r["workload"] == list(workload) and r["arm"] == arm]
        if not own:
            continue
        cells = ""
        for i in range(len(LEVELS)):
            last = [run["errors"][-1][i] for run in own]
            cells += f"{f'{statistics.mean(last):.3f} ± {(max(last) - min(last)) / 2:.3f}':>15}"
        seconds = statistics.mean(1000 * run["seconds"] / run["steps"][-1] for run in own)
        opened = "" if own[0]["open"] is None else f"{statistics.mean(r['open'] for r in own):7.0%}"
        print(f"{arm:22}{cells}{seconds:15.2f}{opened}")


def draw(runs: list[dict], workloads: list[tuple[str, str]], path: Path) -> None:
    """Draw errors against steps at one noise level, and against noise levels at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(workloads), 7.5), layout="constrained")
    grid = figure.subplots(2, len(workloads), squeeze=False, sharey=True)
    shown = LEVELS.index(SHOWN)
    for (above, below), workload in zip(grid.T, workloads, strict=True):
        for number, arm in enumerate(ARMS):
            own = [r for r in runs if r["workload"] == list(workload) and r["arm"] == arm]
            if not own:
                continue
            errors = torch.tensor([run["errors"] for run in own]).mean(dim=0)
            style = {"color": f"C{number}", "label": arm, "marker": ".", "linewidth": 1.2}
            above.plot(own[0]["steps"], errors[:, shown], **style)
            below.plot(LEVELS, errors[-1], **style)
        above.set_title(f"{workload[0]}\nunit weight on {workload[1]}")
        above.set_xlabel("steps")
        below.set_xlabel("noise level")
        below.set_xscale("log")
        below.set_xticks(LEVELS, [f"{level:g}" for level in LEVELS])
        below.minorticks_off()
    grid[0, 0].set_ylabel(f"error of the score at s = {SHOWN:g}")
    grid[1, 0].set_ylabel("error of the score at the end")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="one set, one seed and few steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/taylor_small_batches"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options.folder.mkdir(parents=True, exist_ok=True)
    workloads = WORKLOADS[:1] if options.quick else WORKLOADS
    settings = {"size": POINTS, "depth": 3, "rate": 1e-3}
    if options.quick:
        settings = {"size": POINTS // 16, "depth": 2, "rate": 6e-3, "seeds": 1, "steps": 20}
    vars(options).update(settings)

    begin = time.perf_counter()
    runs: list[dict] = []
    for workload in workloads:
        truth = Truth(workload[0], options.size)
        for arm in ARMS:
            if arm in SLOW and workload != WORKLOADS[0]:
                continue
            runs += [train(options, workload, arm, truth, seed) for seed in range(options.seeds)]
        (options.folder / "runs.json").write_text(json.dumps(runs))
        report(runs, workload)
    draw(runs, workloads, options.folder / "taylor_small_batches.png")
    print(f"\ntook {(time.perf_counter() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
