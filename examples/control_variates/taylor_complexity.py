"""Find how large a network may be for its Taylor polynomial to explain the gradient's noise.

    python examples/control_variates/taylor_complexity.py

MLPs of several widths and depths are trained on eight Gaussians. What the noise ε adds to the
variance of the gradient at one noise level s is compared with what is left of it under pairs of
opposite noise (at equal draws) and under control variates of orders 0, 1 and 2 (per draw, at any
cost). Coefficients are fitted to the gradients of one half of the samples, and judged by the
other half (Jeha, Grathwohl, Andersen, Ek and Frellsen 2024, arXiv 2408.12270). Results:

* At a tenth of the width of a Gaussian, s = 0.01, everything explains nearly everything: pairs and
  order 0 a factor of 300 to 4000, order 1 of 10⁵ to 10⁷, order 2 of 10⁸ to 10¹⁰. As samples and
  times add variance of their own, orders 1 and 2 cannot gain more than order 0 there.
* The larger the noise, the more the size of the network matters. At s = 0.1 order 1 falls from 1100
  with width 16 and depth 1 to 6 with width 64 and depth 8; at s = 0.3 from 19 to 1 with width 256
  and depth 4, where hardly anything helps.
* Pairs leave the same as order 0, the part that is even in ε, and need no coefficient. The factor
  of two between them at low noise is that of the passes through the network.
* Order 2 can be worse than order 1 where its polynomial diverges, in deep networks at s = 0.1 and
  more, and worse than nothing.
* A fitted coefficient is about as good as any fixed one, or better. Order 0 with 1 doubles noise
  at s = 0.3, where the fitted one removes a fifth. Only at low noise, where almost nothing is left,
  does a fixed 1 leave less by up to a half: 64 samples fit the coefficient to a percent.

It takes seven minutes on one thread. The results are in ``runs/taylor_complexity``.
"""

import argparse
import json
import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_vr import VE, Clean, DiffusionModule, ResidualMLP
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import Rows, mapped, tensors
from lightning_vr.core.types import Noised, TargetEstimate, Times
from lightning_vr.data import EightGaussians
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.taylor.terms import taylor_terms

NETWORKS = [(width, depth) for width in (16, 64, 256) for depth in (1, 2, 4, 8)][:-1]
"""Widths and depths, without the last pair, which would take as long as all others together."""

WIDE = 128
"""Width above which half as many samples suffice: larger gradients are averages over more."""

LEVELS = (0.01, 0.03, 0.1, 0.3)
"""Noise levels; each of the eight Gaussians has a standard deviation of 0.1."""

TERMS = {"order 0": [1], "order 1": [2, 3], "order 2": [4, 5]}
"""Positions in ``Terms`` of the odd and the even term of each order."""

PAIR = 6
"""Position among the covariances of the mean loss of a pair."""

FIXED = (0.25, 0.5, 0.75, 1.0)
"""Fixed coefficients, compared with fitted ones in one network."""

SHOWN = (64, 2)
"""Width and depth of that network."""

ELEMENTS = 1 << 26
"""Numbers of gradients at a time: a quarter of a gigabyte."""


class Terms(nn.Module):
    """The loss of a draw and its Taylor terms."""

    def __init__(self, module: DiffusionModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Rows, is_controlled: bool) -> tuple[Tensor, Tensor]:
        """Return the loss and the terms of one draw ``(6,)``, or the loss alone, and the loss."""
        noised, target = Noised(**rows["noised"]), TargetEstimate(**rows["target"])
        network, objective = self.module.predict, self.module.objective
        loss = diffusion_loss(network, noised, target, objective).per_draw
        orders = range(3) if is_controlled else ()
        terms = [taylor_terms(network, noised, objective, order)[0] for order in orders]
        return torch.cat([loss, *terms]), loss


def trained(width: int, depth: int, seed: int, steps: int) -> DiffusionModule:
    """Train a network as usual."""
    seed_everything(seed, verbose=False)
    module = DiffusionModule(
        ResidualMLP(2, width=width, depth=depth),
        schedule=VE(0.002, 1.0),
        prediction="epsilon",
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        lr_scheduler=partial(CosineAnnealingLR, T_max=steps),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, EightGaussians(batch_size=128))
    return module


def covariances(
    module: DiffusionModule, x0: Tensor, level: float, key: str
) -> tuple[Tensor, float]:
    """Return the covariances of the gradients of loss, terms and pairs at a noise level.

    Args:
        module: A trained module.
        x0: Samples ``(n, d)``.
        level: The noise level.
        key: Names the draws.

    Returns:
        The trace of the covariance of each two gradients over the noise, given sample and time,
        ``(7, 7)``, and the mean loss.
    """
    terms = Terms(module)
    parameters = {name: p.detach() for name, p in terms.named_parameters()}
    size = sum(p.numel() for p in parameters.values())
    source = generator("complexity", key, str(level))
    found, losses = torch.zeros(PAIR + 1, PAIR + 1, dtype=torch.float64), 0.0
    for part in x0.split(max(1, ELEMENTS // (30 * size))):
        vectors, opposites = [], []
        for _ in range(2):
            rows, opposite = draws(module, part, level, source)
            own, loss = gradients(terms, parameters, rows, is_controlled=True)
            vectors.append(own)
            opposites.append(gradients(terms, parameters, opposite, is_controlled=False)[0])
            losses += float(loss.sum()) / (2 * len(x0))
        pairs = [(v[:, :1] + o) / 2 for v, o in zip(vectors, opposites, strict=True)]
        # the difference of two draws for one sample has twice the covariance
        first, second = (torch.cat([v, p], dim=1) for v, p in zip(vectors, pairs, strict=True))
        difference = (first - second).double()
        found += torch.einsum("nip,njp->ij", difference, difference) / (2 * len(x0))
    return found, losses


def draws(
    module: DiffusionModule, x0: Tensor, level: float, source: torch.Generator
) -> tuple[Rows, Rows]:
    """Return a draw of each sample at a noise level, and the draw with opposite noise."""
    t = module.schedule.time(torch.full((len(x0),), level))
    noised, target = module.draw(Clean(x0), source, Times(t, torch.ones_like(t)))
    xt = module.schedule.perturb(x0, -noised.noise, t)
    opposite = replace(noised, noise=-noised.noise, xt=xt)
    both = ({"noised": tensors(one), "target": tensors(target)} for one in (noised, opposite))
    first, second = (mapped(rows, lambda x: x[:, None]) for rows in both)
    return first, second


def gradients(
    terms: Terms, parameters: dict[str, Tensor], rows: Rows, *, is_controlled: bool
) -> tuple[Tensor, Tensor]:
    """Return per-sample gradients ``(n, 6, P)``, or ``(n, 1, P)``, and losses ``(n, 1)``."""

    def one(parameters: dict[str, Tensor], row: Rows) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = functional_call(terms, parameters, (row, is_controlled))
        return found

    jacobian = vmap(jacrev(one, has_aux=True), in_dims=(None, 0))
    by_parameter, losses = jacobian(parameters, rows)
    return torch.cat([each.flatten(2) for each in by_parameter.values()], dim=2), losses


def fitted(covariance: Tensor, order: str) -> Tensor:
    """Return the coefficients of an order's terms with the least variance of the gradient."""
    own = TERMS[order]
    matrix, products = covariance[own][:, own], covariance[own, 0]
    # the odd term can be larger than the even one by many orders of magnitude
    scale = matrix.diagonal().rsqrt()
    return scale * torch.linalg.solve(matrix * scale[:, None] * scale, products * scale)


def reduction(covariance: Tensor, order: str, beta: Tensor) -> float:
    """Return the factor that an order's terms lower the noise's part of the variance by."""
    own = TERMS[order]
    matrix, products = covariance[own][:, own], covariance[own, 0]
    plain = covariance[0, 0]
    return float(plain / (plain - 2 * beta @ products + beta @ matrix @ beta))


def measure(module: DiffusionModule, x0: Tensor, level: float) -> dict:
    """Return reductions at a noise level, fitted on one half of the samples, measured on the other.

    Args:
        module: A trained module.
        x0: Held-out samples ``(n, d)``.
        level: The noise level.
    """
    first, second = x0.chunk(2)
    fit, _ = covariances(module, first, level, "fit")
    found, loss = covariances(module, second, level, "measure")
    pair = found[0, 0] / 2 / found[PAIR, PAIR]
    reductions, fixed = {"pairs": float(pair)}, {}
    for order in TERMS:
        reductions[order] = reduction(found, order, fitted(fit, order))
        fixed[order] = [
            reduction(found, order, torch.full((len(TERMS[order]),), b, dtype=torch.float64))
            for b in FIXED
        ]
    coefficients = {order: fitted(fit, order).tolist() for order in TERMS}
    return {"loss": loss, "reductions": reductions, "fixed": fixed, "coefficients": coefficients}


def report(found: dict[tuple[int, int], dict[float, dict]]) -> None:
    """Print reductions of every network, at each noise level."""
    methods = ("pairs", *TERMS)
    for level in found[SHOWN]:
        print(f"\ns = {level:g}: variance of the noise without over with")
        print(f"{'width':>6}{'depth':>6}{'loss':>8}" + "".join(f"{m:>11}" for m in methods))
        for (width, depth), by_level in found.items():
            own = by_level[level]
            cells = "".join(f"{own['reductions'][m]:11.3g}" for m in methods)
            print(f"{width:6}{depth:6}{own['loss']:8.3f}{cells}")


def report_coefficients(by_level: dict[float, dict]) -> None:
    """Print the reductions by fixed coefficients in one network, beside the fitted ones."""
    width, depth = SHOWN
    print(f"\nwidth {width}, depth {depth}: fixed coefficients, and fitted ones on other draws")
    head = "".join(f"{f'{b:g}':>11}" for b in FIXED)
    print(f"{'':8}{'s':>6}{head}{'fitted':>11}   odd, even")
    for order in TERMS:
        for level, own in by_level.items():
            cells = "".join(f"{x:11.3g}" for x in [*own["fixed"][order], own["reductions"][order]])
            betas = ", ".join(f"{beta:.2f}" for beta in own["coefficients"][order])
            print(f"{order:8}{level:6g}{cells}   {betas}")


def draw(found: dict[tuple[int, int], dict[float, dict]], path: Path) -> None:
    """Draw reductions against depth, by width and noise level."""
    from matplotlib.figure import Figure

    widths = sorted({width for width, _ in found})
    ticks = sorted({depth for _, depth in found})
    levels = list(found[SHOWN])
    figure = Figure(figsize=(3 * len(levels), 2.6 * len(widths)), layout="constrained")
    grid = figure.subplots(len(widths), len(levels), squeeze=False, sharex=True, sharey="col")
    for row, width in zip(grid, widths, strict=True):
        depths = sorted(depth for w, depth in found if w == width)
        for axes, level in zip(row, levels, strict=True):
            for method in ("pairs", *TERMS):
                values = [found[width, d][level]["reductions"][method] for d in depths]
                axes.plot(depths, values, marker=".", label=method)
            axes.axhline(1, color="grey", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
        row[0].set_ylabel(f"width {width}\nreduction")
    for axes, level in zip(grid[0], levels, strict=True):
        axes.set_title(f"s = {level:g}")
    for axes in grid[-1]:
        axes.set_xlabel("depth")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="two small networks and few steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/taylor_complexity"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options.folder.mkdir(parents=True, exist_ok=True)
    networks, levels, steps, samples = NETWORKS, LEVELS, options.steps, options.samples
    if options.quick:
        networks, levels, steps, samples = [(16, 1), SHOWN], LEVELS[::3], 60, 32

    begin = time.perf_counter()
    data = EightGaussians()
    data.setup("fit")
    held_out = data.val_dataloader().dataset
    x0 = torch.stack([held_out[i]["x0"] for i in range(samples)])
    found: dict[tuple[int, int], dict[float, dict]] = {}
    for width, depth in networks:
        module = trained(width, depth, 0, steps)
        found[width, depth] = {
            level: measure(module, x0[: samples // (1 + (width > WIDE))], level) for level in levels
        }
        named = {f"width {w}, depth {d}": each for (w, d), each in found.items()}
        (options.folder / "reductions.json").write_text(json.dumps(named, indent=1))
    report(found)
    report_coefficients(found[SHOWN])
    draw(found, options.folder / "taylor_complexity.png")
    print(f"\ntook {(time.perf_counter() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
