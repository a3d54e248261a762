"""How much less noise does score distillation have with more draws, and when does that pay?

A scene of 3-D Gaussians (``scene.py``) learns to look like a digit from all sides, by the scores of
a diffusion model of digits. At fixed scenes this measures the variance of the scene's gradient
between views and within one, for uniform times, strata, the weight as proposal, a learned one and
antithetic pairs; the seconds of a step; and how many steps a classifier needs to recognise held-out
views.

    python examples/score_distillation/score_distillation.py
    python examples/score_distillation/score_distillation.py --quick

Results are rows of ``runs/score_distillation/results.csv``: a run that was stopped goes on, and
rows that are there are not measured again.
"""

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer, seed_everything
from scene import Gaussians
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from lightning_vr import (
    CARV,
    VP,
    Clean,
    DiffusionModule,
    FrozenTeacher,
    LearnedProposal,
    OrbitViews,
    ScoreDistillationLoss,
    TableProposal,
    WeightProposal,
)
from lightning_vr.core.rng import generator
from lightning_vr.data import Digits
from lightning_vr.metrics import DigitFeatures
from lightning_vr.teachers import distill
from lightning_vr.variance.intervals import Interval, jackknife

VIEWS = OrbitViews(1, azimuth=(-30, 30), elevation=(-10, 10))
GUIDANCE, BINS, RATE = 5.0, 32, 0.02
BASE, BEST = "K = 1 uniform", "K = 8 weight, strata, pairs"
LOGS = ("log ratio", "low", "high")


class Results:
    """Numbers by name, kept in a CSV file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, {}
        if path.exists():
            self.rows = {name: float(x) for name, x in csv.reader(path.read_text().splitlines())}

    def get(self, names: list[str], measure: Callable[[], list[float]]) -> list[float]:
        """Return numbers, measured if they are not there."""
        if any(name not in self.rows for name in names):
            self.rows |= dict(zip(names, measure(), strict=True))
            with self.path.open("w", newline="") as file:
                csv.writer(file).writerows(self.rows.items())
        return [self.rows[name] for name in names]


def unet() -> UNet2DModel:
    """Return the network of the teacher, for ten digits and none."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )


def trained_teacher(folder: Path, steps: int) -> FrozenTeacher:
    """Train a diffusion model of digits, unless that is done, and freeze it."""
    path = folder / f"teacher_{steps}.ckpt"
    if not path.exists():
        seed_everything(0)
        settings: dict[str, Any] = {"num_classes": 10, "label_dropout": 0.15}
        optimizer = partial(torch.optim.AdamW, lr=2e-3)
        module = DiffusionModule(unet(), VP(), "epsilon", optimizer=optimizer, **settings)
        trainer = Trainer(
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            limit_val_batches=0,
            enable_model_summary=False,
        )
        trainer.fit(module, Digits(32))
        trainer.save_checkpoint(path)
    return FrozenTeacher.from_checkpoint(path, guidance=GUIDANCE)


def designs(learned: LearnedProposal, oracle: TableProposal) -> dict[str, CARV]:
    """Return draws of one view: strata are those of the view."""
    weight = WeightProposal
    return {
        "K = 1 uniform": CARV(1, scope="none"),
        "K = 1 weight": CARV(1, weight(), scope="none"),
        "K = 1 learned": CARV(1, learned, scope="none"),
        "K = 1 oracle": CARV(1, oracle, scope="none"),
        "K = 8 uniform": CARV(8, scope="none"),
        "K = 8 strata": CARV(8, scope="sample"),
        "K = 8 weight": CARV(8, weight(), scope="none"),
        "K = 8 weight, strata": CARV(8, weight(), scope="sample"),
        "K = 8 pairs": CARV(8, scope="none", antithetic=True),
        "K = 8 weight, strata, pairs": CARV(8, weight(), scope="sample", antithetic=True),
        "K = 8 learned, strata, pairs": CARV(8, learned, scope="sample", antithetic=True),
    }


def train(
    scene: Gaussians,
    loss: ScoreDistillationLoss,
    digit: int,
    steps: int,
    views: int = 1,
    stop: Callable[[int], bool] = lambda step: False,
) -> int:
    """Train a scene; return the number of steps."""
    optimizer = torch.optim.Adam(scene.parameters(), RATE)
    orbit = OrbitViews(views, VIEWS.azimuth, VIEWS.elevation)
    for step in range(steps):
        view = orbit.draw(generator(loss.seed, "view", step))
        found = loss(scene(view.azimuth, view.elevation), group=torch.full((views,), digit))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        loss.advance()
        if stop(step + 1):
            return step + 1
    return steps


class Measurement:
    """Gradients of a fixed scene, of many views and draws.

    Views are antipodal pairs, so that both kinds of mean over two views can be had from them.
    """

    def __init__(self, scene: Gaussians, teacher: FrozenTeacher, digit: int, views: int) -> None:
        self.teacher, self.digit = teacher, digit
        orbit = OrbitViews(views, VIEWS.azimuth, VIEWS.elevation, antipodal=True)
        view = orbit.draw(generator("measured views"))
        parameters = {name: p.detach() for name, p in scene.named_parameters()}

        def image(p: dict[str, Tensor], azimuth: Tensor, elevation: Tensor) -> Tensor:
            return functional_call(scene, p, (azimuth[None], elevation[None])).flatten()

        taken = vmap(jacrev(image), in_dims=(None, 0, 0), chunk_size=8)
        found = taken(parameters, view.azimuth, view.elevation)
        self.jacobian = torch.cat([x.flatten(2) for x in found.values()], dim=2)
        self.x0 = scene(view.azimuth, view.elevation).detach()
        self.loss = ScoreDistillationLoss(teacher)

    def draws(self, draws: CARV, copies: int, key: str) -> tuple[Tensor, Any]:
        """Return cotangents ``(views, copies, 64)``, and the estimate."""
        parts, estimate = [], None
        for i, x0 in enumerate(self.x0.split(16)):
            x = x0.repeat_interleave(copies, 0).requires_grad_()
            clean, source = Clean(x, torch.full((len(x),), self.digit)), generator(key, i)
            given = (self.teacher.noise_residual, draws, self.loss.objective, source)
            estimate = distill(clean, *given)
            parts.append(estimate.gradient.reshape(len(x0), copies, -1))
        return torch.cat(parts), estimate

    def gradients(self, draws: CARV, copies: int, key: str) -> Tensor:
        """Return gradients by the scene ``(views, copies, P)``."""
        cotangents, _ = self.draws(draws, copies, key)
        return torch.einsum("vmi,vip->vmp", cotangents, self.jacobian)

    def oracle(self, copies: int) -> TableProposal:
        """Return the proposal by the norm of single gradients in bins of t."""
        moments, counts = torch.zeros(BINS), torch.zeros(BINS)
        for i in range(len(self.x0)):
            x = self.x0[i : i + 1].repeat(copies, 1, 1, 1).requires_grad_()
            clean = Clean(x, torch.full((copies,), self.digit))
            given = (self.teacher.noise_residual, CARV(1), self.loss.objective)
            found = distill(clean, *given, generator("oracle", i))
            g = found.gradient.flatten(1) @ self.jacobian[i]
            bins = (BINS * self.loss.objective.timesteps.cdf(found.noised.t)).long()
            moments.index_add_(0, bins.clamp(max=BINS - 1), g.square().sum(1))
            counts.index_add_(0, bins.clamp(max=BINS - 1), torch.ones(copies))
        return TableProposal((moments / counts.clamp(min=1)).sqrt().tolist())


def components(gradients: Tensor) -> tuple[float, float, float]:
    """Return variance within views, between them, and twice that of means of antipodal pairs."""
    within = gradients.var(dim=1).sum(-1).mean()
    means = gradients.mean(dim=1)
    noise = within / gradients.shape[1]
    between = means.var(dim=0).sum() - noise
    pairs = 2 * means.reshape(-1, 2, means.shape[-1]).mean(1).var(dim=0).sum() - noise
    return float(within), float(between), float(pairs)


def variance_ratio(base: Tensor, own: Tensor, best: Tensor) -> Interval:
    """Return the log of the variance of the baseline, 1 draw of 2 views, over that of 1 view.

    Pairs of views are the repetitions, as the two of a pair depend on each other.

    Args:
        base: Variance within each view ``(views,)`` of one uniform draw.
        own: Variance within each view of the draws of the one view.
        best: Gradients ``(views, copies, P)`` of little noise, for the variance between views.
    """
    (views, copies), means = best.shape[:2], best.mean(dim=1)

    def log_ratio(base: Tensor, own: Tensor, noise: Tensor, square: Tensor, mean: Tensor) -> Tensor:
        spread = (square - mean.square().sum(-1)) * views / (views - 1)
        between = spread - noise / copies
        return (0.5 * (between + base) / (between + own)).log()

    samples = (base, own, best.var(dim=1).sum(-1), means.square().sum(-1), means)
    return jackknife(log_ratio, *(x.reshape(-1, 2, *x.shape[1:]).mean(dim=1) for x in samples))


def measure_variance(results: Results, teacher: FrozenTeacher, step: int, quick: bool) -> None:
    """Measure every design at the scene after so many steps, with standard errors over views."""
    learned = LearnedProposal(bins=BINS)
    scene = Gaussians(supersampling=2)
    train(scene, ScoreDistillationLoss(teacher, CARV(8, learned, antithetic=True)), 3, step)
    views, copies = (8, 2) if quick else (64, 4)
    measured = Measurement(scene, teacher, 3, views)
    oracle = measured.oracle(2 * BINS if quick else 8 * BINS)
    taken = designs(learned, oracle)
    base = measured.gradients(taken[BASE], 8 * copies, "measured draws").var(dim=1).sum(-1)
    best = measured.gradients(taken[BEST], copies, "measured draws")
    for name, draws in taken.items():
        more = copies * (8 if draws.draws_per_sample == 1 else 1)
        names = [f"step {step}/{name}/{x}" for x in ("within", "between", "pairs", "error", *LOGS)]

        def found(draws: CARV = draws, more: int = more) -> list[float]:
            gradients = measured.gradients(draws, more, "measured draws")
            own = gradients.var(dim=1).sum(-1)
            error = float(own.std() / len(own) ** 0.5)
            return [*components(gradients), error, *variance_ratio(base, own, best)]

        within, between, _, error, *_ = results.get(names, found)
        print(f"step {step}, {name}: within {within:.3f} ± {error:.3f}, between {between:.3f}")


def measure_seconds(results: Results, teacher: FrozenTeacher, size: int, rounds: int) -> None:
    """Measure the CPU seconds of whole steps in turn, medians, whatever else the machine does.

    Blocks of five rounds are the repetitions of the ratio of (2,1) to (1,8).
    """
    cases = {
        (2, 1): CARV(1, scope="none"),
        (1, 1): CARV(1, scope="none"),
        (1, 8): CARV(8, WeightProposal(), antithetic=True),
        (1, 16): CARV(16),
    }
    scene = Gaussians(supersampling=size)

    def measured() -> list[float]:
        losses = {case: ScoreDistillationLoss(teacher, draws) for case, draws in cases.items()}
        seconds = torch.zeros(rounds + 1, len(cases), dtype=torch.float64)
        for row in seconds:
            for i, (case, loss) in enumerate(losses.items()):
                start = time.process_time()
                train(scene, loss, 3, 1, views=case[0])
                row[i] = time.process_time() - start
        blocks = seconds[1:].reshape(-1, 5, len(cases)).median(dim=1).values
        ratio = jackknife(lambda a, b: (a / b).log(), blocks[:, 0], blocks[:, 2])
        return [*seconds[1:].median(dim=0).values.tolist(), *ratio]

    names = [f"seconds/{size}/{x}" for x in (*(f"{r},{k}" for r, k in cases), *LOGS)]
    for name, value in zip(names[: len(cases)], results.get(names, measured), strict=False):
        print(f"{name}: {1e3 * value:.1f} ms")


def measure_quality(results: Results, teacher: FrozenTeacher, seeds: int, limit: int) -> None:
    """Count steps until a classifier is 0.9 sure of the digit in 8 held-out views."""
    classifier = DigitFeatures()
    held_out = OrbitViews(8, VIEWS.azimuth, VIEWS.elevation).draw(generator("held out"))
    cases = {
        "(2,1) uniform": (2, lambda: CARV(1, scope="none")),
        "(1,1) uniform": (1, lambda: CARV(1, scope="none")),
        "(1,8) uniform": (1, lambda: CARV(8, scope="none")),
        "(1,8) weight, strata, pairs": (1, lambda: CARV(8, WeightProposal(), antithetic=True)),
    }
    for name, (views, draws) in cases.items():
        for digit in (3, 7):
            for seed in range(seeds):
                scene = Gaussians(supersampling=2, seed=seed)

                def sure(step: int, scene: Gaussians = scene, digit: int = digit) -> bool:
                    with torch.no_grad():
                        images = scene(held_out.azimuth, held_out.elevation)
                    return float(classifier.probabilities(images)[:, digit].mean()) > 0.9

                loss = ScoreDistillationLoss(teacher, draws(), seed=seed)
                run = lambda: [train(scene, loss, digit, limit, views, sure)]  # noqa: B023, E731
                (steps,) = results.get([f"quality/{name}/{digit}/{seed}"], run)
                print(f"{name}, digit {digit}, seed {seed}: {steps:.0f} steps")


def ecm(results: Results, step: int, size: int, name: str) -> Interval:
    """Return the ECM of K = 8 at one view over one uniform draw at two views."""
    parts = (f"step {step}/{name}", f"seconds/{size}")
    variance, cost = (Interval(*(results.rows[f"{part}/{x}"] for x in LOGS)) for part in parts)
    return variance.plus(cost).exp()


def report(results: Results, steps: list[int], sizes: list[int], path: Path) -> None:
    """Print relative efficiencies and ECMs, and draw them."""
    rows, figure = results.rows, plt.figure(figsize=(7, 3.5))
    names = list(dict.fromkeys(x.split("/")[1] for x in rows if x.startswith("step")))
    names = [name for name in names if name.startswith("K = 8")]
    axes = figure.subplots()
    for i, step in enumerate(steps):
        between = rows[f"step {step}/{BEST}/between"]
        pairs = rows[f"step {step}/{BEST}/pairs"]
        kinds = ("uniform", "weight", "learned", "oracle")
        uniform, weight, learned, oracle = (rows[f"step {step}/K = 1 {x}/within"] for x in kinds)
        shares = [(uniform - x) / (uniform - oracle) for x in (weight, learned)]
        print(
            f"\nstep {step}: V_W {uniform:.3f}, V_B {between:.3f}, in antipodal pairs {pairs:.3f}"
        )
        print("share of the oracle's reduction: weight {:.2f}, learned {:.2f}".format(*shares))
        base, found = between + rows[f"step {step}/K = 8 uniform/within"], []
        for name in names:
            own = between + rows[f"step {step}/{name}/within"]
            found.append(base / own)
            ecms = {size: ecm(results, step, size, name) for size in sizes}
            values = ", ".join(
                f"{x.estimate:.2f} [{x.low:.2f}, {x.high:.2f}] (S = {size})"
                for size, x in ecms.items()
            )
            print(f"{name}: variance {own:.3f}, RE {base / own:.2f}, ECM over (2,1) {values}")
        axes.barh([j + 0.4 * i for j in range(len(names))], found, 0.38, label=f"step {step}")
    axes.set_yticks(range(len(names)), [name.removeprefix("K = 8 ") for name in names])
    axes.set_xlabel("relative efficiency at K = 8, R = 1")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/score_distillation"))
    arguments = parser.parse_args()
    quick, folder = arguments.quick, arguments.folder
    torch.set_num_threads(1)  # CPU seconds are then those of the work
    results = Results(folder / "results.csv")
    teacher = trained_teacher(folder, 4 if quick else 420)
    steps, sizes = ([2], [2]) if quick else ([60, 150], [5, 8, 16])
    for step in steps:
        measure_variance(results, teacher, step, quick)
    for size in sizes:
        measure_seconds(results, teacher, size, 10 if quick else 100)
    measure_quality(results, teacher, 1 if quick else 2, 2 if quick else 150)
    report(results, steps, sizes, folder / "score_distillation.png")


if __name__ == "__main__":
    main()
