"""Is a step's cost ``αR + RK``? Processor seconds of steps with R samples and K draws of each.

A frozen network stands for the upstream; its width sets what a sample costs.
Source: Bettencourt et al. 2026, arXiv 2605.21489, figure 21.
"""

import time
from functools import partial

import numpy as np
import torch
from digits_models import clean_digits, model
from scipy.optimize import nnls
from study import Study, Table, bootstrap, markdown
from torch import Tensor, nn

from lightning_vr import CARV, Diffusion
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean

WIDTHS = (256, 2048)
SIZES = [(r, k) for r in (4, 8, 16, 32) for k in (1, 2, 4, 8) if r * k <= 128]


def run(study: Study) -> None:
    keys = ("width", "repeat", "samples", "draws")
    table = Table(study.folder / "carv_cost.csv", keys, ("seconds",))
    step, repeats = (4, 2) if study.is_quick else (800, 15)
    found, _ = model("ve, n = 1", 0, step, study)
    for width in WIDTHS:
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
        upstream = nn.Sequential(nn.Linear(64, width), *layers, nn.Linear(width, 64))
        upstream.requires_grad_(False)
        timed(found, upstream, 4, 1)  # the first step prepares
        for repeat in range(repeats):
            for samples, draws in SIZES:
                if not table.has(width, repeat, samples, draws):
                    study.check_time()
                    seconds = timed(found, upstream, samples, draws)
                    row = {"width": width, "repeat": repeat, "samples": samples, "draws": draws}
                    table.add(**row, seconds=seconds)
    report(table)


def timed(found: Diffusion, upstream: nn.Module, samples: int, draws: int) -> float:
    """Return the processor seconds of a step, gradients included."""
    clean = clean_digits(samples, "cost")
    source, draw = generator("cost"), CARV(draws)
    started = time.process_time()
    with torch.no_grad():
        x0 = clean.x0 + 1e-3 * upstream(clean.x0.flatten(1)).reshape(clean.x0.shape)
    encoded = Clean(x0, index=clean.index)
    times = draw.times(encoded, found.objective, source)
    loss = found.compute_loss(*found.draw(encoded, source, times, draws=draw), draws=draw).loss
    torch.autograd.grad(loss, list(found.network.parameters()))
    return time.process_time() - started


def report(table: Table) -> None:
    """Print coefficients and misfits with 95 % intervals over repeats."""
    rows = []
    for width in WIDTHS:
        cells = [table.select("seconds", width=width, samples=r, draws=k) for r, k in SIZES]
        repeats = np.array(cells).T

        def estimate(chosen: Tensor, j: int, repeats: np.ndarray = repeats) -> float:
            return coefficients(np.median(repeats[chosen], axis=0))[j]

        found = (bootstrap(partial(estimate, j=j), len(repeats)) for j in range(6))
        rows.append((width, *("{:.3g} ({:.3g} to {:.3g})".format(*each) for each in found)))
    header = ("width", "α of αR + RK", "largest misfit, %", "fixed part, ms", "ms of R", "ms of RK")
    print(markdown((*header, "largest misfit, %"), rows))


def coefficients(seconds: np.ndarray) -> tuple[float, ...]:
    """Return α and its misfit in percent; fixed part and parts of R and RK in ms, and theirs."""
    r, k = np.array(SIZES, float).T
    published = fit(np.stack([r, r * k], axis=1), seconds)
    fixed = fit(np.stack([np.ones_like(r), r, r * k], axis=1), seconds)
    alpha = published[0][0] / published[0][1]
    return float(alpha), 100 * published[1], *(1e3 * fixed[0]).tolist(), 100 * fixed[1]


def fit(columns: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Return non-negative coefficients by relative least squares, and the largest error."""
    found, _ = nnls(columns / seconds[:, None], np.ones_like(seconds))
    return found, float(np.abs(columns @ found / seconds - 1).max())
