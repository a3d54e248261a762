"""Compare objectives by what they leave of the same held-out plain loss, at equal compute.

    python examples/objectives/compare_objectives.py

Each density of t or loss weight trains the same network from the same weights, with the same
batches and noise, for as many steps. All are then measured by one validation objective, the plain
one: uniform t and unit weight on the velocity, on held-out digits with fixed noise, in total and at
each noise level. Densities and weights that need losses get them from a short plain run.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_vr import (
    Asymmetric,
    Beta,
    Diffusion,
    EntropyRate,
    LogitNormal,
    P2Weighting,
    RectifiedFlow,
    ResidualMLP,
    Shifted,
    SoftMinSNRWeighting,
    UncertaintyWeighting,
)
from lightning_vr.core.rng import generator
from lightning_vr.data import Digits
from lightning_vr.process import Density, Weighting
from lightning_vr.process.sampling import evaluating

BATCH, DECAY = 128, 0.995
LEVELS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
PLAIN = "uniform t"
SCHEDULE = RectifiedFlow()

Parts = tuple[Density | None, Weighting | None]


def objectives(levels: Tensor, errors: Tensor) -> dict[str, Callable[[], Parts]]:
    """Return what is compared, given mean squared errors of x0_hat at noise levels."""
    measured = levels.tolist(), errors.tolist()
    return {
        PLAIN: lambda: (None, None),
        "logit-normal": lambda: (LogitNormal(), None),
        "logit-normal, shift 3": lambda: (Shifted(LogitNormal(), 3.0), None),
        "beta(1.5, 1)": lambda: (Beta(1.5, 1.0), None),
        "beta(0.7, 0.7)": lambda: (Beta(0.7, 0.7), None),
        "SpeeD": lambda: (Asymmetric(), P2Weighting()),
        "entropy rate": lambda: (EntropyRate(SCHEDULE, *measured), None),
        "soft-min-SNR": lambda: (None, SoftMinSNRWeighting()),
        "P2": lambda: (None, P2Weighting()),
        "uncertainty": lambda: (None, UncertaintyWeighting(*measured)),
    }


def train(parts: Parts, images: Tensor, seed: int, steps: int, width: int) -> Diffusion:
    """Return a trained model with averaged weights."""
    torch.manual_seed(seed)
    network = ResidualMLP(images.shape[1], width=width, depth=3)
    timesteps, weighting = parts
    model = Diffusion(network, SCHEDULE, "velocity", timesteps=timesteps, weighting=weighting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    averaged = copy.deepcopy(model)
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator(seed, "batch", step))
        loss = model.loss(images[rows], generator(seed, "train", step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
    return averaged


@torch.no_grad()
def squared_errors(model: Diffusion, images: Tensor, t: Tensor, *key: str) -> Tensor:
    """Return the squared error of x0_hat per dimension, for each image at its own time."""
    noise = torch.randn(images.shape, generator=generator(*key))
    with evaluating(model):
        x0 = model.denoise(SCHEDULE.perturb(images, noise, t), t)
    return (x0 - images).square().mean(dim=1)


def validate(model: Diffusion, images: Tensor, repeats: int) -> list[float]:
    """Return the plain loss and its part at each noise level: unit weight on the velocity."""
    rows = images.repeat(repeats, 1)
    u = (torch.randperm(len(rows), generator=generator("strata")) + 0.5) / len(rows)
    t = SCHEDULE.t_min + (SCHEDULE.t_max - SCHEDULE.t_min) * u
    # x0_hat - x0 is t times the error of the velocity
    found = [float((squared_errors(model, rows, t, "held out") / t**2).mean())]
    for level in LEVELS:
        t = SCHEDULE.time(torch.full((len(images),), level))
        found.append(float((squared_errors(model, images, t, "level") / t**2).mean()))
    return found


def pilot(images: Tensor, steps: int, width: int) -> tuple[Tensor, Tensor]:
    """Return noise levels and mean squared errors of x0_hat of a short plain run."""
    model = train((None, None), images, 1000, steps, width)
    levels = torch.logspace(-1.5, 1.5, 16)
    errors = [
        squared_errors(model, images, SCHEDULE.time(torch.full((len(images),), float(s))), "pilot")
        for s in levels
    ]
    return levels, torch.stack(errors).mean(dim=1)


def table(results: dict[str, list[list[float]]]) -> str:
    """Return mean plain losses, and at each noise level the ratio to the plain objective's."""
    lines = ["| objective | plain loss | " + " | ".join(f"s = {s:g}" for s in LEVELS) + " |"]
    lines.append("|---" * (len(LEVELS) + 2) + "|")
    plain = torch.tensor(results[PLAIN])
    for name, rows in results.items():
        found = torch.tensor(rows)
        ratios = ((found / plain)[:, 1:].mean(dim=0) - 1) * 100
        spread = statistics.stdev(found[:, 0].tolist()) if len(rows) > 1 else float("nan")
        cells = [name, f"{float(found[:, 0].mean()):.4f} ± {spread:.4f}"]
        cells += [f"{float(x):+.1f} %" for x in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    plain = torch.tensor(results[PLAIN])
    for name, rows in results.items():
        ratio = (torch.tensor(rows) / plain)[:, 1:].mean(dim=0)
        axes.semilogx(LEVELS, ratio, "o-", markersize=3, label=name)
    axes.set_xlabel("noise level  s = σ / α")
    axes.set_title("held-out plain loss, over that of the plain objective")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20, help="draws of each held-out digit")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.width, options.repeats = 10, 1, 16, 1
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    sets = Digits().build_datasets()
    images, held_out = (torch.stack([x["image"].flatten() for x in rows]) for rows in sets)
    started = time.process_time()
    compared = objectives(*pilot(images, max(2, options.steps // 5), options.width))
    results: dict[str, list[list[float]]] = {name: [] for name in compared}
    for seed in range(options.seeds):
        for name, parts in compared.items():
            model = train(parts(), images, seed, options.steps, options.width)
            results[name].append(validate(model, held_out, options.repeats))
            print(f"seed {seed}, {name}: plain loss {results[name][-1][0]:.4f}", flush=True)
    print(table(results))
    (options.folder / "objectives.json").write_text(json.dumps(results, indent=2))
    draw(results, options.folder / "objectives.png")
    print(f"{time.process_time() - started:.0f} core-seconds")


if __name__ == "__main__":
    main()
