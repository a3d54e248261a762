"""Variance of the target on the sets of the paper: phases, V_DSM, D and V_STF against n.

Exact: the posterior of a finite set is known, so that no network is trained. Errors come from
blocks of draws with references of their own (``lightning_vr/variance/target_measurement.py``).
Source: Xu, Tong and Jaakkola 2023, arXiv 2302.00670, figures 2 and 3, theorem 2.
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from study import Study, interval, markdown
from torch import Tensor

from lightning_vr.core.rng import generator
from lightning_vr.data import Digits, ImageFolder, TwoGaussians
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.variance.target_curves import MeasuredCurve, TargetVarianceCurve
from lightning_vr.variance.target_measurement import measure_target_variance

COUNTS = (4, 16, 64, 256, 1024)
LEVELS = {"two_gaussians": (0.03, 100.0), "digits": (0.1, 30.0), "cifar10": (0.3, 300.0)}
SAMPLES = {"two_gaussians": 4096, "digits": 2048, "cifar10": 256}


def run(study: Study) -> None:
    curves = {}
    for name in LEVELS:
        path = study.folder / f"target_variance_{name}.pt"
        if not path.exists():
            study.check_time()
            data = samples(name, study)
            if data is None:
                continue
            torch.save(measure(name, data, study.is_quick).state(), path)
        curves[name] = TargetVarianceCurve.from_state(torch.load(path, weights_only=True))
    print(phases(curves))
    print(law(curves))
    print(of_the_population(study.is_quick))
    draw(curves, study)


def samples(name: str, study: Study) -> Tensor | None:
    """Return the set ``(N, *)``; of CIFAR-10 the 4096 images of figure 3."""
    size = 128 if study.is_quick else 4096
    if name == "two_gaussians":
        return TwoGaussians().draw(size, generator("evidence"))[0]
    if name == "digits":
        rows = Digits().build_datasets()[0]
        return torch.stack([rows[i]["image"] for i in range(min(size, len(rows)))])
    path = study.images("cifar10")
    if path is None:
        return None
    rows = ImageFolder(path, 32).build_datasets()[0]
    chosen = torch.randperm(len(rows), generator=generator("evidence"))[:size]
    return torch.stack([rows[i]["image"] for i in chosen.tolist()])


def measure(name: str, data: Tensor, is_quick: bool) -> TargetVarianceCurve:
    low, high = LEVELS[name]
    levels = torch.logspace(math.log10(low), math.log10(high), 6 if is_quick else 24)
    counts = [n for n in COUNTS if n <= len(data)]
    drawn, blocks = (32, 4) if is_quick else (SAMPLES[name], 64)
    return measure_target_variance(data, levels, counts, samples=drawn, blocks=blocks)


def phases(curves: dict[str, TargetVarianceCurve]) -> str:
    """Return where the phases begin and end, and what V_DSM and D do in them."""
    rows = []
    for name, curve in curves.items():
        levels, variance, divergence = curve.noise_levels, curve.dsm.mean, curve.divergence.mean
        effective = curve.ess[curve.size].mean
        inside = (effective >= 1.1) & (effective <= 0.5 * curve.size)
        rise = divergence[1:] / divergence[:-1] - 1
        terms = second_term(name, curve) / variance
        errors = relative_error(curve.dsm), 0.5 * relative_error(curve.divergence)
        halves = 1.96 * terms * torch.hypot(*errors)
        cells = (
            float(levels[inside].min()),
            float(levels[inside].max()),
            float(levels[variance.argmax()]),
            float(levels[(variance * levels**2).argmax()]),
        )
        ends = terms[inside].argmin(), terms[inside].argmax()
        ratios = (f"{terms[inside][i]:.2g} ± {halves[inside][i]:.1g}" for i in ends)
        rises = f"{float(rise.max()):+.1e}"
        rows.append((name, curve.size, *(f"{x:.2g}" for x in cells), rises, " to ".join(ratios)))
    header = ("set", "N", "phase 2 from s", "to", "peak of V_DSM", "of V_DSM s²")
    last = "largest rise of D", "second over first term of theorem 2 in phase 2"
    return markdown((*header, *last), rows)


def law(curves: dict[str, TargetVarianceCurve]) -> str:
    """Return for each set and n what STF takes off, and how far V_STF is from V_DSM / (n - 1)."""
    rows = []
    for name, curve in curves.items():
        for n, stf in curve.stf.items():
            ratio = (n - 1) * stf.mean / curve.dsm.mean
            half = 1.96 * ratio * torch.hypot(relative_error(stf), relative_error(curve.dsm))
            peak = int(curve.dsm.mean.argmax())
            cells = [f"{float(ratio[i]):.2f} ± {float(half[i]):.2f}" for i in (peak, -1)]
            cells += [lowest_from(curve.noise_levels, ratio < 2)]
            cells += [f"{(n - 1) / float(ratio[peak]):.2f}"]
            cells += [lowest_from(curve.noise_levels, ratio <= (n - 1) / 10)]
            bound = (curve.dsm.mean + second_term(name, curve)) / (n - 1)
            rows.append((name, n, *cells, f"{float((stf.mean / bound).max()):.3f}"))
    header = ("set", "n", "(n - 1) V_STF / V_DSM at the peak", "far away", "below 2 from s")
    last = "V_DSM / V_STF at the peak", "above 10 from s", "largest V_STF over the bound"
    return markdown((*header, *last), rows)


def relative_error(curve: MeasuredCurve) -> Tensor:
    return curve.error / curve.mean


def lowest_from(levels: Tensor, holds: Tensor) -> str:
    """Return the lowest level from which on a condition holds."""
    held = holds.flip(0).cumprod(0).flip(0).bool()
    return f"{float(levels[held].min()):.2g}" if bool(held.any()) else "nowhere"


def second_term(name: str, curve: TargetVarianceCurve) -> Tensor:
    """Return the second term of the bound of theorem 2, without its factor 1 / (n - 1)."""
    dimension = {"two_gaussians": 64, "digits": 64, "cifar10": 3072}[name]
    return math.sqrt(3 * dimension) * curve.divergence.mean.sqrt() / curve.noise_levels**2


def of_the_population(is_quick: bool) -> str:
    """Return ``(n - 1) V_STF / V_DSM`` of two Gaussians, references drawn anew from the density."""
    rows, counts = [], (16,) if is_quick else (16, 256)
    for std in (0.0, 0.1):
        data = TwoGaussians(std=std)
        for level in (1.0, 2.0, 4.0, 8.0, 16.0):
            dsm = float(data.target_variance(1.0, level))
            cells = [f"{dsm * level**2:.3g}"]
            for n in counts:
                found = [
                    population_error(data, level, n, i) / level**4
                    for i in range(8 if is_quick else 200)
                ]
                cells.append(interval([(n - 1) * x / dsm for x in found], 2))
            rows.append((f"{std:g}", f"{level:g}", *cells))
    header = ("std", "s", "V_DSM s²", *(f"n = {n}" for n in counts))
    return markdown(header, rows)


def population_error(data: TwoGaussians, level: float, n: int, key: int) -> float:
    """Return the mean of ``‖D_S - D‖²`` over n draws of x_t, whose samples are the references."""
    source = generator("population", n, key)
    x0 = data.draw(n, source)[0]
    xt = x0 + level * torch.randn(x0.shape, generator=source, dtype=x0.dtype)
    found = posterior_mean(xt, 1.0, level, x0).mean
    exact = data.mixture.posterior_mean(xt, 1.0, level)
    return float((found - exact).square().sum(dim=1).mean())


def draw(curves: dict[str, TargetVarianceCurve], study: Study) -> None:
    figure = Figure(figsize=(14, 4 * len(curves)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(curves), 3))
    for row, (name, curve) in zip(axes, curves.items(), strict=True):
        levels, dsm = curve.noise_levels, curve.dsm.mean
        effective = curve.ess[curve.size].mean
        row[0].semilogx(levels, dsm / dsm.max(), label="V_DSM")
        weighted = dsm * levels**2
        row[0].semilogx(levels, weighted / weighted.max(), label="V_DSM s²")
        scaled = curve.divergence.mean.clamp(min=1e-30).log10()
        row[0].semilogx(levels, scaled.clamp(min=0) / scaled.max(), label="log₁₀ D")
        inside = levels[(effective > 1.1) & (effective < 0.5 * curve.size)]
        if len(inside):
            row[0].axvspan(float(inside.min()), float(inside.max()), alpha=0.1, label="phase 2")
        row[0].set_title(f"{name}, N = {curve.size}: each over its maximum")
        row[1].loglog(levels, dsm, "k", label="V_DSM")
        for n, stf in curve.stf.items():
            row[1].loglog(levels, stf.mean, label=f"V_STF, n = {n}")
            is_known = torch.maximum(relative_error(stf), relative_error(curve.dsm)) < 0.25
            ratio = ((n - 1) * stf.mean / dsm)[is_known]
            row[2].semilogx(levels[is_known], ratio, label=f"n = {n}")
        row[1].set_ylim(1e-10 * float(dsm.max()), 3 * float(dsm.max()))
        row[1].set_title("variance of the target, units of the score")
        row[2].axhline(1, color="black", linewidth=0.8)
        row[2].set_yscale("log")
        row[2].set_title("(n - 1) V_STF / V_DSM: 1 by theorem 2")
        for each in row:
            each.set_xlabel("noise level  s = σ / α")
            each.legend(fontsize=8)
            each.grid(alpha=0.3)
    path = study.folder / "target_variance.png"
    figure.savefig(path, dpi=90)
    with Image.open(path) as drawn:
        few_colours = drawn.convert("RGB").quantize(64)
    few_colours.save(path, optimize=True)
