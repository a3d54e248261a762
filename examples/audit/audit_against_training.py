"""Compare the savings that an audit of targets predicts with those of training.

Three workloads train with the plain target, with the STF that has the largest multiplier in the
audit, and with the plain target at twice the batch size, each over several seeds. What is compared
is the compute (steps, times the seconds of a step that the audit measures) to reach the held-out
denoising loss that the plain target has at the end, averaged over seeds. The doubled batch halves
the variance, and shows what a smaller variance gains at all.

    python examples/audit/audit_against_training.py --workload digits_edm --seeds 5

The results are in ``runs/audit_against_training``.
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from workloads import QUIET, adamw, unet

from lightning_vr import DSM, EDM, EMA, STF, VE, Candidate, DiffusionModule, ResidualMLP, audit
from lightning_vr.auditing import save_report
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean, Times
from lightning_vr.data import Digits, EightGaussians
from lightning_vr.estimators.targets import Target
from lightning_vr.lifecycle.weight_averaging import averaged_weights
from lightning_vr.process.sampling import evaluating

WORKLOADS = {"digits_edm": 750, "digits_ve": 750, "eight_gaussians": 3000}
"""Steps of training for each workload."""

EVALUATIONS = 30
"""How often the held-out loss is measured."""


def network(workload: str) -> torch.nn.Module:
    if workload == "eight_gaussians":
        return ResidualMLP(2, width=128)
    return unet(is_labelled=True)


def build(
    workload: str, target: Target, batch_factor: int = 1
) -> tuple[DiffusionModule, LightningDataModule]:
    settings = {
        "network": network(workload),
        "schedule": VE() if workload == "digits_ve" else EDM(),
        "target": target,
        "sigma_data": 1.0 if workload == "eight_gaussians" else 0.75,
    }
    settings["optimizer"] = adamw(1e-3 if workload == "eight_gaussians" else 2e-3)
    if workload == "eight_gaussians":
        data = EightGaussians(batch_size=32 * batch_factor, num_samples=8192, num_validation=4096)
        return DiffusionModule(**settings), data
    settings |= {"num_classes": 10, "label_dropout": 0.1}
    return DiffusionModule(**settings), Digits(batch_size=128 * batch_factor)


class HeldOutLoss(Callback):
    """Plain denoising loss of held-out samples, with stratified times and fixed noise."""

    def __init__(self, every: int, repeats: int) -> None:
        self.every, self.repeats = every, repeats
        self.steps: list[int] = []
        self.losses: dict[str, list[float]] = {"raw": [], "averaged": []}

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        data = trainer.datamodule.val_dataloader().dataset
        rows = [data[i] for i in range(len(data))] * self.repeats
        batch = {name: torch.stack([torch.as_tensor(r[name]) for r in rows]) for name in rows[0]}
        clean = module.clean(batch)
        count, source = len(clean.x0), generator("held out")
        u = (torch.randperm(count, generator=source) + torch.rand(count, generator=source)) / count
        t = module.timesteps.icdf(u.double().clamp(1e-9, 1 - 1e-9)).float()
        self.clean, self.t = clean, t

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        if trainer.global_step % self.every:
            return
        self.steps.append(trainer.global_step)
        self.losses["raw"].append(self.measure(module))
        with averaged_weights(trainer, module):
            self.losses["averaged"].append(self.measure(module))

    @torch.no_grad()
    def measure(self, module: DiffusionModule) -> float:
        total = 0.0
        with evaluating(module):
            for start in range(0, len(self.clean.x0), 1024):
                rows = slice(start, start + 1024)
                clean: Clean = self.clean.rows(rows)
                times = Times(self.t[rows], torch.ones_like(self.t[rows]))
                found = module.draw(clean, generator("held out", start), times, target=DSM())
                total += float(module.compute_loss(*found).per_draw.sum())
        return total / len(self.clean.x0)


def train(
    workload: str, target: Target, seed: int, steps: int, batch_factor: int = 1
) -> tuple[HeldOutLoss, DiffusionModule]:
    seed_everything(seed, verbose=False)
    module, data = build(workload, target, batch_factor)
    held_out = HeldOutLoss(steps // EVALUATIONS, repeats=1 if workload == "eight_gaussians" else 4)
    callbacks = [EMA(decay=0.98), held_out]
    Trainer(max_steps=steps, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    return held_out, module


def steps_to(loss: float, steps: np.ndarray, losses: np.ndarray) -> float:
    """Return the first step at which a curve, made monotone, reaches ``loss``."""
    best = np.minimum.accumulate(losses)
    if best[-1] > loss:
        return float("nan")
    i = int(np.argmax(best <= loss))
    if i == 0:
        return float(steps[0])
    fraction = (best[i - 1] - loss) / (best[i - 1] - best[i])
    return float(steps[i - 1] + fraction * (steps[i] - steps[i - 1]))


def step_ratio(
    base: np.ndarray, other: np.ndarray, steps: np.ndarray, source: np.random.Generator
) -> tuple[float, float, float]:
    """Return steps of ``base`` over those of ``other`` to the final loss of ``base``, with 95 %."""

    def ratio(b: np.ndarray, o: np.ndarray) -> float:
        goal = b.mean(axis=0)[int(0.7 * len(steps)) :].mean()
        return steps_to(goal, steps, b.mean(axis=0)) / steps_to(goal, steps, o.mean(axis=0))

    drawn = []
    for _ in range(1000):
        rows = source.integers(len(base), size=len(base))
        drawn.append(ratio(base[rows], other[rows]))
    low, high = np.nan, np.nan
    if not np.isnan(drawn).all():  # a short run may never reach the loss
        low, high = np.nanquantile(drawn, [0.025, 0.975])
    return ratio(base, other), float(low), float(high)


def predict(workload: str, budget: float, folder: Path) -> None:
    """Audit in the middle of training with the plain target; store the best candidate."""
    _, halfway = train(workload, DSM(), seed=100, steps=WORKLOADS[workload] // 2)
    _, data = build(workload, DSM())
    targets = [STF("batch"), STF(256), STF(1024), STF("all")]
    rivals = [Candidate(f"STF({t.references!r})", target=t) for t in targets]
    found = audit(halfway, data, rivals, budget=budget)
    save_report(found, folder / workload)
    best = max(found.estimators[1:], key=lambda measured: measured.multiplier.estimate)
    prediction = {
        "candidate": best.name,
        "references": best.config["target"]["init_args"]["references"],
        "multiplier": list(best.multiplier),
        "efficiency": list(best.efficiency),
        "saving": best.predicted_speedup.estimate,
        "noise_ratio": found.noise_ratio,
        "time_ratio": found.current.seconds / best.seconds,
    }
    (folder / f"{workload}_predicted.json").write_text(json.dumps(prediction, indent=2))


def realise(workload: str, seeds: int, folder: Path) -> None:
    """Train with the plain target, the candidate and the doubled batch; store the losses."""
    prediction = json.loads((folder / f"{workload}_predicted.json").read_text())
    arms = {
        "plain": (DSM, 1),
        "candidate": (functools.partial(STF, prediction["references"]), 1),
        "doubled batch": (DSM, 2),
    }
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name, (target, factor) in arms.items():
        runs = [
            train(workload, target(), seed, WORKLOADS[workload], factor)[0] for seed in range(seeds)
        ]
        found[name] = {key: [run.losses[key] for run in runs] for key in ("raw", "averaged")}
        steps = runs[0].steps
    curves = {"steps": steps, "losses": found}
    (folder / f"{workload}_trained.json").write_text(json.dumps(curves))


def report(folder: Path) -> None:
    """Print a table and draw the curves of all workloads that have run."""
    from matplotlib.figure import Figure

    kinds = ("predicted", "trained")
    names = [n for n in WORKLOADS if all((folder / f"{n}_{k}.json").exists() for k in kinds)]
    if not names:
        return
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for i, name in enumerate(names):
        prediction = json.loads((folder / f"{name}_predicted.json").read_text())
        trained = json.loads((folder / f"{name}_trained.json").read_text())
        axes = figure.add_subplot(1, len(names), i + 1)
        for arm, curves in trained["losses"].items():
            axes.plot(trained["steps"], np.mean(curves["averaged"], axis=0), label=arm)
        axes.set_title(f"{name}, {prediction['candidate']}")
        axes.set_xlabel("steps")
        axes.set_ylabel("held-out denoising loss")
        axes.legend()
        compare(name, prediction, trained)
    figure.savefig(folder / "audit_against_training.png", dpi=120)


def compare(name: str, prediction: dict, trained: dict) -> None:
    """Print the predicted and the realised savings, of averaged weights and of raw ones."""
    print(
        f"\n{name}: {prediction['candidate']}, noise ratio {prediction['noise_ratio']:.3g}, "
        f"RE {interval(*prediction['efficiency'])}, ECM {interval(*prediction['multiplier'])}, "
        f"by the noise-ratio model {prediction['saving']:.2f}"
    )
    steps, time = np.array(trained["steps"]), prediction["time_ratio"]
    for key in ("averaged", "raw"):
        losses = {arm: np.array(curves[key]) for arm, curves in trained["losses"].items()}
        source = np.random.default_rng(0)
        fewer = step_ratio(losses["plain"], losses["candidate"], steps, source)
        doubled = step_ratio(losses["plain"], losses["doubled batch"], steps, source)
        # the doubled batch says what a factor on the variance saves in steps, as a power of it
        exponent = np.log2(doubled[0])
        worth = prediction["efficiency"][0] ** exponent * time
        print(
            f"  {key}: realised {interval(*(time * each for each in fewer))} in compute, "
            f"{interval(*fewer)} in steps; doubled batch {interval(*doubled)} in steps, by which "
            f"the candidate is worth {worth:.2f} in compute"
        )


def interval(estimate: float, low: float, high: float) -> str:
    return f"{estimate:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, help="all if not given")
    parser.add_argument("--only", choices=("audit", "training"), help="both if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/audit_against_training"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.workload, options.seeds, options.budget = "eight_gaussians", 1, 1.0
        WORKLOADS["eight_gaussians"] = 2 * EVALUATIONS
    options.folder.mkdir(parents=True, exist_ok=True)
    for workload in [options.workload] if options.workload else WORKLOADS:
        if options.only != "training":
            predict(workload, options.budget, options.folder)
        if options.only != "audit":
            realise(workload, options.seeds, options.folder)
    report(options.folder)


if __name__ == "__main__":
    main()
