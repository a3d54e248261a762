"""On large sets: does the bracket from a subset hold the exact floor, and how wide is it?

Twenty sets of points, drawn from a Gaussian mixture, from heavy tails (Student's t with two degrees
of freedom), or in 32 dimensions. The exact floor is the posterior mean under all samples, at many
more draws; the bracket knows one sample in ten. Also: the floor of two points at low noise, where
rare events make all of it.

    python examples/convergence/brackets.py
    python examples/convergence/brackets.py --quick
"""

import argparse
import math
from collections.abc import Callable

import torch

from lightning_vr import EDM, Clean, LogUniform, posterior_mean
from lightning_vr.core.types import Noised
from lightning_vr.variance.convergence import ConvergenceMeasurement
from lightning_vr.variance.convergence_curves import LossCurves, loss_curves
from lightning_vr.variance.fixed_draws import FixedDraws, LevelTimes
from lightning_vr.variance.optimum import Population

LEVELS = 8


def mixture(count: int, source: torch.Generator) -> torch.Tensor:
    centres = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)).double()
    which = torch.randint(10, (count,), generator=source)
    return centres[which] + 0.1 * torch.randn(count, 8, generator=source).double()


def heavy_tails(count: int, source: torch.Generator) -> torch.Tensor:
    squares = torch.randn(count, 2, generator=source).double().square().mean(dim=1)
    return torch.randn(count, 8, generator=source).double() / squares.sqrt()[:, None]


def normal(count: int, source: torch.Generator) -> torch.Tensor:
    return torch.randn(count, 32, generator=source).double()


SETS = {"mixture": mixture, "heavy tails": heavy_tails, "32 dimensions": normal}


def measured(x: torch.Tensor, known: int, samples: int) -> LossCurves:
    """Return the curves of the exact denoiser, from ``known`` of the samples."""
    times = LevelTimes.stratified(EDM(), LogUniform(0.05, 20.0), LEVELS, samples)
    at = torch.arange(min(samples, len(x))) * len(x) // min(samples, len(x))
    index = torch.arange(known) * len(x) // known
    population = Population.prepare(Clean(x[index], index=index), len(x))

    def losses(noised: Noised) -> torch.Tensor:
        mean = posterior_mean(noised.xt, noised.alpha, noised.sigma, x).mean
        return (mean - noised.x0).square().mean(dim=1)

    draws = FixedDraws("train", Clean(x[at], index=at), times, EDM())

    def scale(noised: Noised) -> torch.Tensor:
        return torch.ones_like(noised.t) / x.shape[1]

    cpu = torch.device("cpu")
    found = ConvergenceMeasurement(draws, None, population, losses, 512, cpu, scale)
    return loss_curves(found.floors, found.measure(0, losses))


def report(name: str, draw: Callable[..., torch.Tensor], seeds: int, size: int) -> None:
    """Count in how many sets the bracket holds the exact floor, and at how many levels."""
    holds, levels, widths = 0, 0, []
    for seed in range(seeds):
        x = draw(size, torch.Generator().manual_seed(seed + 1))
        exact, found = measured(x, size, 512).floor, measured(x, size // 10, 128)
        low, high = found.floor_low, found.floor_high
        below = low.mean - 2 * torch.hypot(low.error, exact.error) <= exact.mean
        above = exact.mean <= high.mean + 2 * torch.hypot(high.error, exact.error)
        levels += int((below & above).sum())
        sums = [float(curve.mean.sum()) for curve in (low, exact, high)]
        error = 2 * float(torch.hypot(low.error, exact.error).sum())
        holds += sums[0] - error <= sums[1] <= sums[2] + error
        widths.append((high.mean / low.mean)[LEVELS // 2 :].mean())
    width = float(torch.stack(widths).mean())
    print(
        f"{name}: {holds} of {seeds} sets, {levels} of {seeds * LEVELS} levels; upper over lower "
        f"bound at the four highest levels {width:.3f}"
    )


def two_points() -> None:
    """Print the floor of two points with its error, and the closed form."""
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    floor = measured(x, 2, 256).floor
    times = LevelTimes.stratified(EDM(), LogUniform(0.05, 20.0), LEVELS, 256).times.double()
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    for level, mean, error in zip(times, *floor, strict=True):
        s = level[:, None]
        values = (1 - torch.tanh((1 + s * z) / s**2) ** 2) * density
        exact = torch.trapezoid(values, z).mean()
        print(f"s = {level.median():.3g}: {mean:.3g} ± {error:.2g}, exact {exact:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one set of few points")
    options = parser.parse_args()
    for name, draw in SETS.items():
        report(name, draw, *((1, 320) if options.quick else (20, 1500)))
    two_points()


if __name__ == "__main__":
    main()
