"""A one-step generator of digits by distribution matching: how noisy is its gradient?

A frozen diffusion model of digits teaches a student that makes them in one step. At a fixed student
this measures the variance of its gradient for R = 8 samples and K draws of each, at fixed samples
and in total; then it trains students with several draws and seeds, and compares their Fréchet
distance at equal CPU time. ``--data eight_gaussians`` does the training on points in the plane,
where distance is how many samples are within three standard deviations of a mode.

    python examples/distribution_matching/distribution_matching.py
    python examples/distribution_matching/distribution_matching.py --data eight_gaussians
    python examples/distribution_matching/distribution_matching.py --quick

Results are rows of ``runs/distribution_matching/results.csv``: a run that was stopped goes on, and
rows that are there are not measured again.
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_vr import (
    CARV,
    VP,
    Clean,
    Diffusion,
    DiffusionModule,
    DistributionMatching,
    FrozenTeacher,
    LearnedProposal,
    ResidualMLP,
)
from lightning_vr.core.rng import generator
from lightning_vr.data import Digits, EightGaussians
from lightning_vr.data.digits import digits
from lightning_vr.metrics import DigitFeatures, FrechetMetric
from lightning_vr.teachers import distill

SAMPLES, EVERY = 1000, 25


class Flat(nn.Module):
    """An MLP on the numbers of a sample, whatever its shape."""

    def __init__(self, size: int, classes: int, width: int = 192) -> None:
        super().__init__()
        self.num_class_embeds = classes + 1
        self.inner = ResidualMLP(size, width, 3, num_class_embeds=classes + 1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return self.inner(x.flatten(1), t, class_labels).reshape(x.shape)


class Data:
    """A data set, and how far samples are from it."""

    def __init__(self, name: str) -> None:
        self.name, self.is_digits = name, name == "digits"
        self.classes = 10 if self.is_digits else 8
        self.shape = (1, 8, 8) if self.is_digits else (2,)
        self.metric = FrechetMetric(DigitFeatures(), reset_real_features=False)
        self.metric.update(digits()[0], real=True)

    def module(self, batch_size: int) -> Digits | EightGaussians:
        """Return batches."""
        return Digits(batch_size) if self.is_digits else EightGaussians(batch_size)

    def distance(self, samples: Tensor) -> float:
        """Return the Fréchet distance, or the fraction of points that are far from every mode."""
        if self.is_digits:
            self.metric.reset()
            self.metric.update(samples.clamp(-1, 1), real=False)
            return float(self.metric.compute())
        data = EightGaussians()
        modes, std = data.mixture.means.float(), float(data.mixture.variances.flatten()[0]) ** 0.5
        return float((torch.cdist(samples, modes).min(dim=1).values > 3 * std).float().mean())


class Results:
    """Numbers by name, kept in a CSV file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, {}
        if path.exists():
            self.rows = {name: float(x) for name, x in csv.reader(path.read_text().splitlines())}

    def add(self, found: dict[str, float]) -> None:
        """Keep numbers."""
        self.rows |= found
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows(self.rows.items())


def quiet_trainer(**settings: Any) -> Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu", limit_val_batches=0, enable_model_summary=False, **silent, **settings
    )


def trained_teacher(data: Data, folder: Path, steps: int) -> FrozenTeacher:
    """Train a diffusion model of the data, unless that is done, and freeze it."""
    seed_everything(0, verbose=False)
    size = int(torch.tensor(data.shape).prod())
    network, path = Flat(size, data.classes), folder / f"{data.name}_{steps}.pt"
    settings: dict[str, Any] = {"num_classes": data.classes, "label_dropout": 0.15}
    settings["sigma_data"] = 0.75 if data.is_digits else 1.0
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = DiffusionModule(network, VP(), "edm", optimizer=optimizer, **settings)
    if not path.exists():
        quiet_trainer(max_steps=steps).fit(module, data.module(128))
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return FrozenTeacher.from_module(Diffusion(network, VP(), "edm", **settings))


def matching(teacher: FrozenTeacher, draws: CARV) -> DistributionMatching:
    optimizer = partial(torch.optim.AdamW, lr=2e-4, betas=(0.0, 0.999))
    return DistributionMatching(teacher, draws=draws, fake_steps=2, optimizer=optimizer)


class Watch(Callback):
    """Measures samples now and then, and the CPU seconds of training alone."""

    def __init__(self, data: Data, results: Results, name: str) -> None:
        self.data, self.results, self.name = data, results, name
        self.seconds, self.start = 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        self.seconds += time.process_time() - self.start
        if module.iteration % EVERY == 0:
            labels = torch.arange(SAMPLES) % self.data.classes
            distance = self.data.distance(module.sample(SAMPLES, group=labels, seed=1))
            key = f"{self.name}/{module.iteration}"
            self.results.add({f"{key}/distance": distance, f"{key}/seconds": self.seconds})


CASES: dict[str, Callable[[], CARV]] = {
    "iid": lambda: CARV(1, scope="none"),
    "strata": lambda: CARV(1),
    "K = 8, learned, strata, pairs": lambda: CARV(8, LearnedProposal(), antithetic=True),
}


def measure_training(
    data: Data, teacher: FrozenTeacher, results: Results, steps: int, seeds: int
) -> None:
    """Train students with each kind of draws."""
    for name, draws in CASES.items():
        for seed in range(seeds):
            own = f"{data.name}/training/{name}/{seed}"
            if f"{own}/{steps}/distance" not in results.rows:
                seed_everything(seed, verbose=False)
                watch = Watch(data, results, own)
                trainer = quiet_trainer(max_steps=3 * steps, callbacks=[watch])
                trainer.fit(matching(teacher, draws()), data.module(64))
            print(
                f"{own}: {results.rows[f'{own}/{steps}/distance']:.3f} after "
                f"{results.rows[f'{own}/{steps}/seconds']:.1f} CPU s"
            )


def designs(learned: LearnedProposal) -> dict[str, CARV]:
    return {
        "(8,1) uniform": CARV(1, scope="none"),
        "(8,1) strata": CARV(1),
        "(8,2) pairs": CARV(2, scope="none", antithetic=True),
        "(8,8) uniform": CARV(8, scope="none"),
        "(8,16) uniform": CARV(16, scope="none"),
        "(8,16) strata": CARV(16),
        "(8,16) learned, strata": CARV(16, learned),
        "(8,16) strata, pairs": CARV(16, antithetic=True),
        "(8,16) learned, strata, pairs": CARV(16, learned, antithetic=True),
    }


def measure_variance(
    data: Data, teacher: FrozenTeacher, results: Results, steps: int, batches: int, repeats: int
) -> None:
    """Measure the variance of the student's gradient at fixed samples, and in total."""
    learned = LearnedProposal()
    draws = designs(learned)
    missing = [x for x in draws if f"{data.name}/variance/{x}/total" not in results.rows]
    if missing:
        seed_everything(0, verbose=False)
        module = matching(teacher, CARV(2, learned))
        quiet_trainer(max_steps=3 * steps).fit(module, data.module(64))
        parameters = [p for p in module.student.parameters() if p.requires_grad]
    for name in missing:
        gradients = []
        for i in range(batches):
            labels = torch.randint(data.classes, (8,), generator=generator("labels", i))
            like = Clean(torch.empty(8, *data.shape), labels)
            x = module.generate(like, generator("z", i))
            for j in range(repeats):
                given = (module.residual, draws[name], module.objective, generator("draws", i, j))
                loss = distill(x, *given).loss
                found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        whole = torch.stack(gradients).reshape(batches, repeats, -1)
        fixed = float(whole.var(dim=1).sum(-1).mean())
        between = float(whole.mean(dim=1).var(dim=0).sum()) - fixed / repeats
        own = f"{data.name}/variance/{name}"
        results.add({f"{own}/fixed": fixed, f"{own}/total": fixed + between})
    base = {x: results.rows[f"{data.name}/variance/(8,1) uniform/{x}"] for x in ("fixed", "total")}
    for name in draws:
        own = {x: results.rows[f"{data.name}/variance/{name}/{x}"] for x in base}
        gains = {x: base[x] / own[x] for x in base}
        print(
            f"{name}: at fixed samples {own['fixed']:.4g} ({gains['fixed']:.1f}x less), "
            f"in total {own['total']:.4g} ({gains['total']:.1f}x)"
        )


def draw(data: Data, results: Results, path: Path) -> None:
    """Draw distance against CPU seconds, a line for each seed."""
    figure, axes = plt.subplots(figsize=(5, 3.5))
    for i, name in enumerate(CASES):
        prefix = f"{data.name}/training/{name}/"
        keys = [
            key.removesuffix("/distance")
            for key in results.rows
            if key.startswith(prefix) and key.endswith("/distance")
        ]
        for j, seed in enumerate(
            dict.fromkeys(key.removeprefix(prefix).split("/")[0] for key in keys)
        ):
            own = [key for key in keys if key.startswith(f"{prefix}{seed}/")]
            pairs = [[results.rows[f"{key}/{x}"] for key in own] for x in ("seconds", "distance")]
            axes.plot(*pairs, color=f"C{i}", label=None if j else name, linewidth=1)
    axes.set(
        xlabel="CPU seconds", ylabel="Fréchet distance" if data.is_digits else "fraction far off"
    )
    axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", choices=["digits", "eight_gaussians"], default="digits")
    parser.add_argument("--folder", type=Path, default=Path("runs/distribution_matching"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(num_workers|val_dataloader|LeafSpec).*")
    quick, folder, data = arguments.quick, arguments.folder, Data(arguments.data)
    results = Results(folder / "results.csv")
    teacher = trained_teacher(data, folder, 4 if quick else 2000)
    if data.is_digits:
        measure_variance(data, teacher, results, *((2, 2, 2) if quick else (200, 24, 12)))
    measure_training(data, teacher, results, EVERY if quick else 300, 1 if quick else 3)
    draw(data, results, folder / f"{data.name}.png")


if __name__ == "__main__":
    main()
