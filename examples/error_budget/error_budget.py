"""Check the error budget where every term is known: on Gaussian mixtures.

    python examples/error_budget/error_budget.py orders        # Euler and Heun on a smooth mixture
    python examples/error_budget/error_budget.py narrow        # four narrow Gaussians
    python examples/error_budget/error_budget.py grids         # polynomial against exponential
    python examples/error_budget/error_budget.py split         # total weight of EDM, split anew

All are on the line, with the exact denoiser known in closed form; the learned one is that plus a
field of size ``epsilon beta(s)``, so that EDM's raw network has an excess loss of ``epsilon²`` at
every noise level. ``--quick`` takes few samples and steps.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_vr import EDM, EDMWeighting, Euler, Heun, LogNormal, Objective
from lightning_vr.data.mixture import GaussianMixture
from lightning_vr.process.grids import spaced
from lightning_vr.process.solvers.solver import StepSolver
from lightning_vr.variance import ErrorBudget, measure_error_budgets

WIDE = torch.float64
TAU = 0.5  # standard deviation of the data
LOW, HIGH = 0.002, 80.0
SCHEDULE = EDM()


def smooth() -> GaussianMixture:
    means = torch.tensor([[0.7], [-0.3]], dtype=WIDE)
    return GaussianMixture(means, std=0.2, weights=torch.tensor([0.3, 0.7], dtype=WIDE))


def narrow(width: float) -> GaussianMixture:
    places = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=WIDE)
    scale = math.sqrt((TAU**2 - width**2) / float(places.square().mean()))
    return GaussianMixture(scale * places[:, None], std=width)


def quantiles(mixture: GaussianMixture, level: float, count: int) -> Tensor:
    """Return quantiles of the noised mixture ``(count, 1)``: an exact start."""
    u = ((torch.arange(count, dtype=WIDE) + 0.5) / count)[:, None]
    deviation = (mixture.variances[:, 0] + level**2).sqrt()
    low, high = torch.full_like(u, -10 * level - 3), torch.full_like(u, 10 * level + 3)
    for _ in range(70):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - mixture.means[:, 0]) / deviation)
        is_below = below @ mixture.weights[:, None] < u
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


def denoiser(mixture: GaussianMixture, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        beta = t * TAU / torch.sqrt(t**2 + TAU**2)
        field = torch.sign(torch.sin(7 * xt)) if epsilon else 0
        return mixture.posterior_mean(xt, 1.0, t) + epsilon * beta[:, None] * field

    return denoise


def budget(
    mixture: GaussianMixture,
    solver: StepSolver,
    grids: dict[str, Tensor],
    count: int,
    epsilon: float = 0.0,
) -> dict[str, ErrorBudget]:
    x = quantiles(mixture, float(next(iter(grids.values()))[0]), count)
    learned, exact = denoiser(mixture, epsilon), denoiser(mixture, 0.0)
    return measure_error_budgets(solver, learned, exact, SCHEDULE, grids, x, x, TAU)


def orders(options: argparse.Namespace) -> None:
    """Print how the error before the last step, at s = 0.02, falls with the number of steps."""
    steps = (16, 32) if options.quick else (32, 64, 128, 256, 512)
    grids = {f"{n}": spaced("exponential", n, 1.0, 0.02, 30.0, SCHEDULE) for n in steps}
    for solver in (Euler(), Heun()):
        before = None
        for name, found in budget(smooth(), solver, grids, 64 if options.quick else 512).items():
            error = float(found.error[-2])
            order = "" if before is None else f", order {math.log2(before / error):.3f}"
            print(f"{type(solver).__name__:5}, {name:>3} steps: error {error:.3e}{order}")
            before = error


def narrow_gaussians(options: argparse.Namespace) -> None:
    """Print the numbers of Brosse and Dalalyan (2026) for K = 17 .. 1088 steps."""
    steps = [17 * 2**i for i in range(2 if options.quick else 7)]
    solver = {"Euler": Euler(), "Heun": Heun()}[options.solver]
    before, rows = None, []
    for n in steps:
        grids = {"own": spaced("polynomial", n + 1, 7.0, LOW, HIGH, SCHEDULE)}
        found = budget(
            narrow(options.width), solver, grids, 256 if options.quick else options.quantiles
        )
        own = found["own"]
        # K steps from one level to the next, without the last one to 0
        carried = own.carried[:-1] / own.carried[-2]
        bound = float((carried * own.local_bias[:-1]).sum())
        error, biases = float(own.error[-2]), float(own.local_bias[:-1].sum())
        log_amplification = float(own.amplification[:-1].log().flip(0).cumsum(0).max())
        line = f"K = {n:4}: biases {biases:.3e}, error {error:.3e}, bound / error "
        line += f"{bound / error:.3f}, directional bound / error "
        line += f"{own.directional_bound / float(own.error[-1]):.3f}, "
        line += f"log-amplification {log_amplification:.3f}"
        if before is not None:
            line += f", orders {math.log2(before[0] / biases):.3f}"
            line += f" and {math.log2(before[1] / error):.3f}"
        print(line, flush=True)
        before = biases, error
        rows.append((n, biases, error, log_amplification))
    print(f"order of summed biases {-slope(rows, 1, torch.log):.3f}")
    print(f"order of the error {-slope(rows, 2, torch.log):.3f}")
    print(f"log-amplification ~ {slope(rows, 3, lambda x: x):.3f} log K")


def slope(
    rows: list[tuple[int, float, float, float]], column: int, scale: Callable[[Tensor], Tensor]
) -> float:
    """Return the least-squares slope of a column against log K."""
    table = torch.tensor(rows, dtype=WIDE)
    x, y = table[:, 0].log(), scale(table[:, column])
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def polynomial_against_exponential(options: argparse.Namespace) -> None:
    """Print and draw bound and error on both grids, as the score gets worse."""
    steps = (8,) if options.quick else (8, 16, 32, 64, 128, 256)
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for at, epsilon in zip(axes, (0.0, 0.05, 0.3), strict=True):
        grids = {
            f"{kind} {n}": spaced(kind, n, 7.0, LOW, HIGH, SCHEDULE)
            for kind in ("polynomial", "exponential")
            for n in steps
        }
        found = budget(narrow(0.05), Euler(), grids, 64 if options.quick else 1024, epsilon)
        for kind, color in (("polynomial", "tab:blue"), ("exponential", "tab:orange")):
            own = [found[f"{kind} {n}"] for n in steps]
            at.loglog(steps, [x.bound for x in own], "--", color=color, label=f"{kind}, bound")
            at.loglog(steps, [float(x.error[-1]) for x in own], "o-", color=color, label=kind)
            for n, x in zip(steps, own, strict=True):
                print(
                    f"epsilon {epsilon:4}, {kind:11} {n:3} steps: error {float(x.error[-1]):.4f}, "
                    f"bound {x.bound:.4f} = {x.discretisation:.4f} discretisation + "
                    f"{x.learned_score:.4f} score"
                )
        at.set_title(f"excess loss {epsilon:g}² of the raw network")
        at.set_xlabel("steps")
        at.grid(alpha=0.3)
    axes[0].set_ylabel("error of samples")
    axes[0].legend()
    figure.savefig(options.folder / "grids.png", dpi=110)


def split(options: argparse.Namespace) -> None:
    """Split the total weight of EDM for least variance; print E w² m, the gradient's moment."""
    objective = Objective(SCHEDULE, LogNormal(), EDMWeighting(TAU), sigma_data=TAU)
    levels = torch.logspace(-2.5, 1.3, 60, dtype=WIDE)
    total = objective.total_weight(levels)
    # gradients of a network that learns nothing at low noise and all at high noise
    moments = (1 + 1 / levels) / (1 + levels**2)
    own = objective.weighting(SCHEDULE, levels) * levels**2
    anew = objective.split(levels.tolist(), total.tolist(), (own**2 * moments).tolist())
    count = 1000 if options.quick else 1_000_000
    for name, each in (("EDM's own split", objective), ("split for least variance", anew)):
        level = each.noise_levels(count)
        weight = each.weighting(SCHEDULE, level) * level**2
        inside = (level > levels[0]) & (level < levels[-1])
        moment = (1 + 1 / level) / (1 + level**2)
        mean, second = ((weight**k * moment * inside).mean() for k in (1, 2))
        print(f"{name}: E w m = {float(mean):.4f}, E w² m = {float(second):.4f}")

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(levels, total, label="total weight W", color="black")
    for name, each, style in (("EDM", objective, "--"), ("least variance", anew, "-")):
        weight = each.weighting(SCHEDULE, levels) * levels**2
        axes.semilogx(levels, each.total_weight(levels) / weight, style, label=f"density, {name}")
    axes.set_xlabel("noise level  s = σ / α")
    axes.set_title("one objective, two splits into density and weight")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(options.folder / "total_weight.png", dpi=110)


STUDIES = {
    "orders": orders,
    "narrow": narrow_gaussians,
    "grids": polynomial_against_exponential,
    "split": split,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--quantiles", type=int, default=65_536, help="of the narrow Gaussians")
    parser.add_argument("--solver", choices=("Euler", "Heun"), default="Euler", help="of them")
    parser.add_argument("--width", type=float, default=0.03, help="of the narrow Gaussians")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in options.studies:
        started = time.process_time()
        STUDIES[name](options)
        print(f"{name}: {time.process_time() - started:.0f} core-seconds")


if __name__ == "__main__":
    main()
