"""Do Taylor control variates pay on small images and a U-Net?

Jeha, Grathwohl, Andersen, Ek and Frellsen 2024 (arXiv 2408.12270) report 1.4 times less gradient
variance at order 2 on MNIST, and no better loss. This repeats their experiment on the digits of
scikit-learn, and compares with estimators that take no more passes:

1. Training from the same seeds: held-out denoising loss and Fréchet distance, at equal steps and at
   equal time. Pairs take half as many samples, so that a step has as many draws.
2. Gradient variance and its cost, early in training and at its end, by ``audit``.
3. What is left of the noise component at single noise levels, with coefficients fitted on the
   gradients of other draws and with fixed ones.
4. Orders 0, 1 and 2 with exact means, on digits of 4 by 4 pixels and an MLP: order 2 takes samples
   of 16 numbers at most.

    python examples/control_variates/taylor_digits.py

takes half an hour on one core. The results are in ``runs/taylor_digits``.

After 500 steps of EDM, order 0 leaves 73 % of the gradient variance in 1.8 times the time of a
step, order 1 42 % in 8.2 times, and pairs 42 % in 1.8 times. With β = 1 below a noise level of 0.3,
as in other code, order 0 leaves 161 %. So pairs pay at equal time, with a held-out loss that is
0.7 % lower, and order 0 does not: its gate stays closed.
"""

import argparse
import functools
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F

from lightning_vr import (
    CARV,
    DSM,
    EDM,
    EMA,
    VE,
    Audit,
    Candidate,
    Clean,
    DiffusionModule,
    Noised,
    ResidualMLP,
    Sampler,
    TargetEstimate,
    TaylorCV,
    audit,
)
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Times
from lightning_vr.data import Digits
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.taylor.terms import taylor_terms
from lightning_vr.lifecycle.weight_averaging import averaged_weights
from lightning_vr.metrics import DigitFeatures, FrechetMetric
from lightning_vr.process.sampling import evaluating
from lightning_vr.variance.intervals import Interval, jackknife, ratio

SCHEDULES = {"EDM": EDM, "VE": VE}

LEVELS = (0.002, 0.01, 0.03, 0.1, 0.3, 1.0)
FIXED = (0.25, 0.5, 0.75, 1.0)
ORDERS = {0: [1], 1: [2, 3]}
"""Rows of ``gradients`` that are the terms of an order."""

Results = dict[str, Any]


@dataclass
class Arm:
    """One way to train.

    Attributes:
        batch: Samples of a step, over those of the other arms.
        slots: Contents of the module's slots.
    """

    batch: float = 1.0
    slots: dict[str, Any] = field(default_factory=dict)


def arms(options: argparse.Namespace) -> dict[str, Arm]:
    closing = TaylorCV(refit_every_n_steps=100, bins=options.bins)
    opened = TaylorCV(gate="open", refit_every_n_steps=50, bins=options.bins)
    return {
        "plain": Arm(),
        "Taylor 0, gate auto": Arm(slots={"control_variate": closing}),
        "Taylor 0, open": Arm(slots={"control_variate": opened}),
        "pairs": Arm(batch=0.5, slots={"draws": CARV(2, antithetic=True)}),
        "strata": Arm(slots={"draws": CARV(1)}),
    }


def candidates(options: argparse.Namespace) -> list[Candidate]:
    variates = {
        "Taylor 0, gate auto": TaylorCV(bins=options.bins),
        "Taylor 0": TaylorCV(gate="open", bins=options.bins),
        "Taylor 0, β = 1 below 0.3": TaylorCV(gate=(0.0, 0.3), coefficient=1.0),
        "Taylor 0, β of the loss": TaylorCV(gate="open", control="objective"),
        "Taylor 1, Rademacher": TaylorCV(1, "rademacher", gate="open"),
    }
    if options.quick:
        return [Candidate("Taylor 0", control_variate=variates["Taylor 0"])]
    draws = {"pairs": CARV(2, antithetic=True), "strata": CARV(1)}
    found = [Candidate(name, control_variate=each) for name, each in variates.items()]
    return found + [Candidate(name, draws=each) for name, each in draws.items()]


def network(widths: list[int], middle: str | None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownBlock2D"] * len(widths),
        mid_block_type=middle,
        up_block_types=["UpBlock2D"] * len(widths),
        num_class_embeds=11,
    )


def build(options: argparse.Namespace, **slots: Any) -> DiffusionModule:
    return DiffusionModule(
        network(options.widths, options.middle),
        schedule=SCHEDULES[options.schedule](),
        num_classes=10,
        label_dropout=0.1,
        sigma_data=0.75,
        sampler=Sampler(steps=options.sampler_steps),
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3),
        **slots,
    )


def fit(
    module: DiffusionModule, data: Digits, steps: int, callbacks: list[Callback] | None = None
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=data)
    return trainer


class Watch(Callback):
    """Times steps; measures the denoising loss of held-out digits with averaged weights.

    Times are stratified, and the noise is the same in every measurement.

    Args:
        every: Steps from one measurement to the next.
        early: Step after which to store the weights.
    """

    def __init__(self, every: int, early: int) -> None:
        self.every, self.early = every, early
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        data = trainer.datamodule.val_dataloader().dataset
        rows = [data[i] for i in range(len(data))] * 2
        batch = {name: torch.stack([torch.as_tensor(r[name]) for r in rows]) for name in rows[0]}
        self.clean, source = module.clean(batch), generator("held out")
        count = len(self.clean.x0)
        u = (torch.randperm(count, generator=source) + torch.rand(count, generator=source)) / count
        self.t = module.timesteps.icdf(u.double().clamp(1e-9, 1 - 1e-9)).float()

    def on_train_batch_start(self, *_: object) -> None:
        # processor time, so that other work on the machine does not count
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        self.seconds.append(time.process_time() - self.start)
        if trainer.global_step == self.early:
            self.weights = {n: x.clone() for n, x in module.network.state_dict().items()}
        if trainer.global_step % self.every == 0:
            self.steps.append(trainer.global_step)
            with averaged_weights(trainer, module):
                self.losses.append(self.measure(module))

    @torch.no_grad()
    def measure(self, module: DiffusionModule) -> float:
        total = 0.0
        with evaluating(module):
            for start in range(0, len(self.t), 240):
                rows = slice(start, start + 240)
                times = Times(self.t[rows], torch.ones_like(self.t[rows]))
                source = generator("held out", start)
                found = module.draw(self.clean.rows(rows), source, times, target=DSM())
                total += float(module.compute_loss(*found).per_draw.sum())
        return total / len(self.t)


def train(options: argparse.Namespace, name: str, seed: int) -> tuple[Results, list[Any]]:
    """Train once; return losses, seconds and distance, and the early and the final weights."""
    seed_everything(seed, verbose=False)
    arm = arms(options)[name]
    module = build(options, **arm.slots)
    data = Digits(batch_size=int(arm.batch * options.batch))
    watch = Watch(options.steps // options.evaluations, options.early)
    trainer = fit(module, data, options.steps, [EMA(decay=0.98), watch])

    metric = FrechetMetric(DigitFeatures())
    images = torch.stack([torch.as_tensor(row["image"]) for row in data.train_dataloader().dataset])
    metric.update(images, real=True)
    with averaged_weights(trainer, module):
        group = torch.arange(options.samples) % 10
        metric.update(module.sample(options.samples, group=group), real=False)
    found = {
        "steps": watch.steps,
        "losses": watch.losses,
        # the first steps warm up; pilots count in the mean
        "seconds": float(np.mean(watch.seconds[options.early :])),
        "distance": float(metric.compute()),
    }
    if isinstance(module.control_variate, TaylorCV):
        found["open"] = float(module.control_variate.fit.is_open.double().mean())
    shown = f"loss {found['losses'][-1]:.4f}, distance {found['distance']:.3g}"
    print(f"{name}, seed {seed}: {shown}, {1e3 * found['seconds']:.0f} ms", flush=True)
    return found, [watch.weights, module.network.state_dict()]


class Shrunken(DiffusionModule):
    """Trains on digits of 4 by 4 pixels, flattened to 16 numbers."""

    def encode(self, batch: Any) -> Clean:
        clean = super().encode(batch)
        return replace(clean, x0=F.avg_pool2d(clean.x0, 2).flatten(1))


def audit_of_orders(options: argparse.Namespace) -> Audit:
    seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    settings: Any = {"schedule": SCHEDULES[options.schedule](), "sigma_data": 0.6}
    module = Shrunken(ResidualMLP(16, width=64), optimizer=optimizer, **settings)
    data = Digits(batch_size=options.batch)
    fit(module, data, 4 * options.steps)
    rivals = [
        Candidate(
            f"Taylor {order}", control_variate=TaylorCV(order, gate="open", bins=options.bins)
        )
        for order in options.orders
    ]
    if not options.quick:
        rivals.append(Candidate("pairs", draws=CARV(2, antithetic=True)))
    return audit(module, data, rivals, budget=options.budget / 2, progress=False)


def gradients(module: DiffusionModule, noised: Noised, target: TargetEstimate) -> Tensor:
    """Return gradients of the loss, of the term of order 0 and of both of order 1, ``(4, P)``."""
    objective, predict = module.objective, module.predict
    loss = diffusion_loss(predict, noised, target, objective).per_draw
    terms = [taylor_terms(predict, noised, objective, order) for order in ORDERS]
    parameters = list(module.parameters())
    found = []
    for each in torch.cat([loss[:, None], *terms], dim=1).mean(dim=0):
        parts = torch.autograd.grad(each, parameters, retain_graph=True, materialize_grads=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def covariances(
    options: argparse.Namespace, module: DiffusionModule, images: Clean, level: float
) -> Tensor:
    """Return covariances of those gradients given sample and time, by repeat ``(n, 4, 4)``."""
    found, size = [], options.level_batch
    for repeat in range(options.repeats):
        source = functools.partial(generator, str(level), repeat)
        clean = images.rows(torch.randperm(len(images.x0), generator=source())[:size])
        t = module.schedule.time(torch.full((size,), level))
        times = Times(t, torch.ones_like(t))
        first, second = (
            gradients(module, *module.draw(clean, source(i), times)).double() for i in range(2)
        )
        found.append(size / 2 * (first - second) @ (first - second).T)
    return torch.stack(found)


def variance(covariance: Tensor, order: int, beta: Tensor) -> Tensor:
    """Return the variance of ``g - β c`` from covariances ``(m, 4, 4)``, ``(m,)``."""
    weights = torch.zeros(4, dtype=torch.float64)
    weights[0], weights[ORDERS[order]] = 1.0, -beta
    return torch.einsum("i,mij,j->m", weights, covariance, weights)


def reductions(
    options: argparse.Namespace, module: DiffusionModule, images: Clean
) -> list[Results]:
    """Return the factor by which the noise component falls, for fitted and fixed coefficients."""
    # with labels given and none dropped, only noise is left
    module.eval().control_variate = TaylorCV(1, "rademacher", gate="open")
    rows = []
    for level in options.levels:
        found = covariances(options, module, images, level)
        fitting, measured = found[: len(found) // 3], found[len(found) // 3 :]
        for order, terms in ORDERS.items():
            mean = fitting.mean(dim=0)
            beta = torch.linalg.solve(mean[terms][:, terms], mean[terms, 0])
            row = {"level": level, "order": order, "beta": beta.tolist()}
            row["fitted"] = reduction(measured, order, beta)
            row["fixed"] = [reduction(measured, order, torch.full_like(beta, b)) for b in FIXED]
            row["lost"] = [lost_reduction(measured, order, beta, b) for b in FIXED]
            rows.append(row)
    return rows


def reduction(measured: Tensor, order: int, beta: Tensor) -> Interval:
    return jackknife(lambda mean: ratio(mean[:, 0, 0], variance(mean, order, beta)), measured)


def lost_reduction(measured: Tensor, order: int, beta: Tensor, fixed: float) -> Interval:
    """Return the fraction of noise that a fixed coefficient removes beyond the fitted one."""
    other = torch.full_like(beta, fixed)

    def difference(mean: Tensor) -> Tensor:
        more = variance(mean, order, beta) - variance(mean, order, other)
        return more / mean[:, 0, 0]

    return jackknife(difference, measured)


def audited(found: Audit) -> Results:
    keys = ("advice", "noise_ratio", "repetitions", "seconds", "skipped", "estimators")
    whole = found.to_dict()
    for row in whole["estimators"]:
        row |= {key: list(row[key].values()) for key in ("efficiency", "multiplier")}
    return {key: whole[key] for key in keys}


def measure(options: argparse.Namespace, results: Results) -> None:
    """Measure everything, and store results on the way."""

    def store() -> None:
        (options.folder / "results.json").write_text(json.dumps(results, indent=1))

    results |= {"training": {name: [] for name in arms(options)}, "audits": {}, "levels": {}}
    weights = train_arms(options, results, seed=0)
    store()
    for name, state in list(weights.items())[-1 if options.quick else 0 :]:
        measure_at(options, name, state, results)
        store()
    results["audits"]["4 by 4"] = audited(audit_of_orders(options))
    for seed in range(1, options.seeds):
        train_arms(options, results, seed)
    store()


def train_arms(options: argparse.Namespace, results: Results, seed: int) -> dict[str, Any]:
    """Train every arm; return the weights of the plain arm, early and at the end."""
    weights: dict[str, Any] = {}
    for name, runs in results["training"].items():
        found, states = train(options, name, seed)
        runs.append(found)
        names = (f"step {options.early}", f"step {options.steps}")
        weights = weights or dict(zip(names, states, strict=True))
    return weights


def measure_at(options: argparse.Namespace, name: str, weights: Any, results: Results) -> None:
    """Audit at fixed weights, and measure single noise levels."""
    seed_everything(0, verbose=False)
    module, data = build(options), Digits(batch_size=options.batch)
    module.network.load_state_dict(weights)
    found = audit(module, data, candidates(options), budget=options.budget, progress=False)
    results["audits"][name] = audited(found)
    print(audit_table(name, results["audits"][name]), flush=True)

    training = data.train_dataloader().dataset
    rows = [training[i] for i in range(len(training))]
    labels = torch.tensor([int(row["label"]) for row in rows])
    images = Clean(torch.stack([torch.as_tensor(row["image"]) for row in rows]), group=labels)
    results["levels"][name] = reductions(options, module, images)
    print(level_table(name, results["levels"][name]), flush=True)


def audit_table(name: str, found: Results) -> str:
    """Return a row for each estimator; variances are fractions of that of the plain one."""
    plain, seconds = (found["estimators"][0][key] for key in ("components", "seconds"))
    whole, noise = plain["total"][0], plain["noise"][0]
    lines = [
        "",
        f"{name}: gradient variance per sample, in % of that of the plain estimator; "
        f"{found['repetitions']} repetitions, noise ratio {found['noise_ratio']:.2g}",
        f"{'':26}{'data':>6}{'time':>6}{'noise':>7}{'total':>7}{'noise falls by':>16}"
        f"{'RE':>22}{'time of a step':>18}{'ECM':>26}",
    ]
    for row in found["estimators"]:
        parts = row["components"]
        percent = [100 * parts[key][0] / whole for key in ("data", "timestep", "noise", "total")]
        lines.append(
            f"{row['name']:26}{percent[0]:6.0f}{percent[1]:6.0f}{percent[2]:7.0f}{percent[3]:7.0f}"
            f"{noise / parts['noise'][0]:16.2f}{interval(row['efficiency']):>22}"
            f"{row['seconds'] / seconds:8.2f} ({1e3 * row['seconds']:4.0f} ms)"
            f"{interval(row['multiplier']):>26}"
        )
    lines += [f"{key} was left out: {why}." for key, why in found["skipped"].items()]
    return "\n".join([*lines, found["advice"]])


def level_table(name: str, rows: list[Results]) -> str:
    """Return factors on the noise component; ! where a fixed coefficient surely does better."""
    header = f"{'order':>6}{'s':>7}{'β odd':>8}{'even':>7}{'fitted':>34}"
    lines = ["", f"{name}: the noise component falls by", header]
    lines[-1] += "".join(f"{f'β = {b:g}':>11}" for b in FIXED)
    for row in rows:
        odd, even = (*(f"{b:.2f}" for b in row["beta"]), "")[:2]
        line = f"{row['order']:6}{row['level']:7}{odd:>8}{even:>7}{interval(row['fitted']):>34}"
        for fixed, lost in zip(row["fixed"], row["lost"], strict=True):
            line += f"{fixed[0]:10.3g}{'!' if lost[1] > 0 else ' '}"
        lines.append(line)
    return "\n".join(lines)


def training_table(found: dict[str, list[Results]]) -> str:
    """Return loss and distance at equal steps, and the loss in the time of the plain steps."""
    plain = found["plain"]
    seconds = np.mean([run["seconds"] for run in plain])
    lines = [
        "",
        f"training, {plain[0]['steps'][-1]} steps, mean over {len(plain)} seeds and (each)",
        f"{'':24}{'step':>8}{'held-out loss':>30}{'at equal time':>15}{'Fréchet distance':>26}",
    ]
    for name, runs in found.items():
        own = np.mean([run["seconds"] for run in runs]) / seconds
        losses = [run["losses"][-1] for run in runs]
        timed = [np.interp(run["steps"][-1] / own, run["steps"], run["losses"]) for run in runs]
        distances = [run["distance"] for run in runs]
        lines.append(
            f"{name:24}{own:7.2f}x{listed(losses, 4):>30}{np.mean(timed):15.4f}"
            f"{listed(distances, 2):>26}"
        )
    opened = {name: [run["open"] for run in runs] for name, runs in found.items() if "auto" in name}
    for name, fractions in opened.items():
        lines.append(f"{name}: fraction of bins that are open at the end {listed(fractions, 2)}")
    return "\n".join(lines)


def listed(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})"


def interval(found: list[float]) -> str:
    estimate, low, high = (float("nan") if x is None else x for x in found)
    return f"{estimate:.3g} ({low:.3g}, {high:.3g})"


def draw(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    (parts, saving), (levels, losses) = figure.subplots(2, 2)
    names = [name for name in results["audits"] if name.startswith("step")]
    draw_parts(parts, results["audits"][names[-1]])
    parts.set_title(f"{names[-1]}: gradient variance, plain = 1")
    for color, name in zip(("tab:blue", "tab:orange"), reversed(names), strict=False):
        draw_multipliers(saving, results["audits"][name], name, color)
    draw_levels(levels, results["levels"][names[-1]])
    levels.set_title(f"{names[-1]}: what the noise component falls by")
    draw_losses(losses, results["training"])
    figure.savefig(path, dpi=110)


def draw_parts(axes: Any, found: Results) -> None:
    rows = found["estimators"]
    whole = rows[0]["components"]["total"][0]
    at, base = np.arange(len(rows)), np.zeros(len(rows))
    for part, color in (("noise", "tab:red"), ("timestep", "tab:orange"), ("data", "tab:blue")):
        height = np.array([max(0.0, row["components"][part][0] / whole) for row in rows])
        axes.barh(at, height, left=base, color=color, label=part)
        base += height
    axes.set_yticks(at, ["plain", *(row["name"] for row in rows[1:])])
    axes.invert_yaxis()
    axes.legend()


def draw_multipliers(axes: Any, found: Results, name: str, color: str) -> None:
    rows = found["estimators"][1:]
    shift = 0.12 if color == "tab:blue" else -0.12
    labels = [row["name"] for row in rows]
    known = [text.get_text() for text in axes.get_yticklabels()] if axes.has_data() else labels
    known += [label for label in labels if label not in known]
    for row in rows:
        at, multiplier = known.index(row["name"]) + shift, row["multiplier"]
        axes.plot(multiplier[1:], [at, at], color=color)
        axes.plot(multiplier[0], at, "o", color=color)
    axes.plot([], [], "o-", color=color, label=name)
    axes.set_yticks(range(len(known)), known)
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.05, 20)
    axes.set_title("effective compute multiplier, 95 % interval")
    axes.legend()


def draw_levels(axes: Any, rows: list[Results]) -> None:
    for order, color in ((0, "tab:blue"), (1, "tab:green")):
        own = [row for row in rows if row["order"] == order]
        at = [row["level"] for row in own]
        middle, low, high = np.array([row["fitted"] for row in own]).T
        errors = [middle - low, high - middle]
        label = f"order {order}, fitted on gradients"
        axes.errorbar(at, middle, errors, fmt="o-", color=color, capsize=3, label=label)
        for style, (i, b) in zip((":", "--"), ((1, 0.5), (3, 1.0)), strict=True):
            fixed = [row["fixed"][i][0] for row in own]
            axes.plot(at, fixed, style, color=color, label=f"order {order}, β = {b:g}")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("noise level  s = σ / α")
    axes.legend(fontsize=8)


def draw_losses(axes: Any, found: dict[str, list[Results]]) -> None:
    seconds = np.mean([run["seconds"] for run in found["plain"]])
    least = np.inf
    for name, runs in found.items():
        own = np.mean([run["seconds"] for run in runs]) / seconds
        mean = np.mean([run["losses"] for run in runs], axis=0)
        axes.plot(own * np.array(runs[0]["steps"]), mean, ".-", label=name)
        least = min(least, mean.min())
    axes.set_ylim(0.98 * least, 1.3 * least)
    axes.set_xlabel("time, in steps of the plain estimator")
    axes.set_title("held-out denoising loss, mean over seeds")
    axes.legend()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", choices=SCHEDULES, default="EDM")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--early", type=int, default=20, help="step of the first audit")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of an audit")
    parser.add_argument("--repeats", type=int, default=18, help="pairs of noises for each level")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/taylor_digits"))
    parser.add_argument("--quick", action="store_true", help="run for some seconds, as a test")
    options = parser.parse_args()
    settings: dict[str, Any] = {
        "batch": 128,
        "widths": [32, 64],
        "middle": "UNetMidBlock2D",
        "sampler_steps": 18,
        "evaluations": 10,
    }
    settings |= {"level_batch": 8, "levels": LEVELS, "orders": (0, 1, 2), "bins": 8}
    if options.quick:
        settings |= {
            "batch": 16,
            "widths": [8],
            "middle": None,
            "sampler_steps": 2,
            "evaluations": 2,
            "samples": 40,
        }
        settings |= {"level_batch": 2, "levels": (0.002, 0.3), "orders": (1,), "repeats": 6}
        settings |= {"bins": 2, "steps": 4, "early": 2, "seeds": 1, "budget": 0.1}
    vars(options).update(settings)
    return options


def main() -> None:
    options, start = parse(), time.perf_counter()
    options.folder.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    measure(options, results)
    tables = [training_table(results["training"])]
    tables += [audit_table(name, found) for name, found in results["audits"].items()]
    tables += [level_table(name, rows) for name, rows in results["levels"].items()]
    tables.append(f"\n{options.schedule}, {(time.perf_counter() - start) / 60:.1f} minutes")
    (options.folder / "tables.txt").write_text("\n".join(tables))
    print("\n".join(tables))
    draw(results, options.folder / "taylor_digits.png")


if __name__ == "__main__":
    main()
