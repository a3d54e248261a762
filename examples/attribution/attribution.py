"""How many draws do gradient features need, and should training and query samples share them?

A small diffusion model of 128 digits is retrained on half of them, again and again, all models in
one vmap. Scores made of gradient features should predict which query digits each model learns well.
This measures the variance of features at 4, 16 and 64 draws, the rank correlation of scores with
those of a thousand draws, the linear datamodeling score (LDS), with shared and with independent
draws, and what class labels, a constant learning rate and the optimizer change. Intervals are 95 %,
by the jackknife over samples.

    python examples/attribution/attribution.py
    python examples/attribution/attribution.py --quick

Results are rows of ``runs/attribution/results.csv``: a run that was stopped goes on, and rows that
are there are not measured again.
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torchmetrics.functional import spearman_corrcoef

from lightning_vr import CARV, VP, Clean, Diffusion, GradientFeatures, LearnedProposal, ResidualMLP
from lightning_vr.core.rng import generator
from lightning_vr.data.digits import digits
from lightning_vr.teachers import (
    SubsetModels,
    cosine_scores,
    linear_datamodeling_score,
    subset_masks,
    trak_scores,
)
from lightning_vr.variance.accounting import relative_efficiency
from lightning_vr.variance.intervals import Interval

TRAINING, QUERIES = 128, 40
DESIGNS = ("uniform", "strata", "learned", "pairs", "strata, pairs", "all")
WAYS = {
    "no labels, falling rate": {},
    "no labels, constant rate": {"falling": False},
    "labels, falling rate": {"labels": True},
    "labels, constant rate": {"labels": True, "falling": False},
    "no labels, falling rate, SGD": {"sgd": True},
}
"""Ways to train the models; the study has the first."""


class Results:
    """Numbers by name, kept in a CSV file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, {}
        if path.exists():
            self.rows = {name: float(x) for name, x in csv.reader(path.read_text().splitlines())}

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """Return a number, measured if it is not there."""
        if name not in self.rows:
            self.rows[name] = measure()
            with self.path.open("w", newline="") as file:
                csv.writer(file).writerows(self.rows.items())
        return self.rows[name]

    def add_interval(self, name: str, measure: Callable[[], Interval]) -> None:
        """Keep a number and its interval, measured if they are not there."""
        if f"{name}/high" not in self.rows:
            for end, value in measure()._asdict().items():
                self.get(f"{name}/{end}", partial(float, value))

    def interval(self, name: str) -> Interval:
        """Return a number and its interval."""
        return Interval(*(self.rows[f"{name}/{end}"] for end in Interval._fields))


def data(labelled: bool) -> tuple[Clean, Clean]:
    """Return training digits and queries as points, with labels or without."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=generator("attribution"))
    every = Clean(images.flatten(1), labels if labelled else None)
    return every.rows(order[:TRAINING]), every.rows(order[TRAINING : TRAINING + QUERIES])


class Study:
    """Models of one prediction type, and the features of the one that was trained on all digits."""

    def __init__(
        self,
        prediction: str,
        folder: Path,
        subsets: int,
        steps: int,
        *,
        labels: bool = False,
        falling: bool = True,
        sgd: bool = False,
    ) -> None:
        self.train, self.query = data(labels)
        self.model = self._model(prediction, labels)
        self.masks = subset_masks(TRAINING, subsets)
        masks = torch.cat([torch.ones(1, TRAINING, dtype=torch.bool), self.masks])
        path = folder / f"{prediction}_{subsets}_{steps}_{labels}_{falling}_{sgd}.pt"
        if not path.exists():
            decay = partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps)
            optimizer: Any = partial(torch.optim.AdamW, lr=1e-3)
            if sgd:
                optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
            models = SubsetModels(self.model, masks, optimizer, decay if falling else None)
            models.train(self.train, steps, batch_size=TRAINING)
            draws = CARV(256, scope="sample", antithetic=True)
            losses = torch.cat(
                [models.losses(self.query.rows([i]), draws) for i in range(QUERIES)], 1
            )
            torch.save({"weights": models.parameters_of(0), "outputs": -losses[1:]}, path)
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["weights"], strict=False)
        self.outputs = saved["outputs"]
        self.proposal = LearnedProposal(bins=16)
        self.features(CARV(1, self.proposal)).learn(self.train, 16)

    def _model(self, prediction: str, labels: bool) -> Diffusion:
        torch.manual_seed(0)
        network = ResidualMLP(64, width=64, depth=2, num_class_embeds=11 if labels else None)
        settings = {"num_classes": 10, "label_dropout": 0.1} if labels else {}
        return Diffusion(network, VP(), prediction, sigma_data=0.75, **settings).eval()

    def features(
        self,
        draws: CARV,
        *,
        shared: bool = False,
        projection: int | None = None,
        seed: int = 0,
    ) -> GradientFeatures:
        """Return features of the model."""
        settings = {"shared": shared, "projection": projection}
        return GradientFeatures(self.model, draws, seed=seed, **settings)

    def draws(self, design: str, count: int) -> CARV:
        """Return draws by name; strata are those of a sample."""
        strata = "sample" if design in ("strata", "strata, pairs", "all") else "none"
        proposal = self.proposal if design in ("learned", "all") else None
        pairs = count > 1 and design in ("pairs", "strata, pairs", "all")
        return CARV(count, proposal, scope=strata, antithetic=pairs)

    def efficiency(self, design: str, count: int, repeats: int) -> Interval:
        """Return the variance of features of uniform draws over that of a design."""
        return relative_efficiency(
            *(self._variances(x, count, repeats) for x in ("uniform", design))
        )

    def spread(self) -> float:
        """Return ``E m / (E sqrt m)²`` of the second moments m of gradients over t.

        It is what one draw gains from the best proposal, and 1 where t makes no difference.
        """
        moments = self._moments()
        return float(moments.mean() / moments.sqrt().mean() ** 2)

    def decline(self) -> float:
        """Return the size of gradients at the highest noise, over that at the lowest."""
        moments = self._moments()
        return float((moments[-1] / moments[0]).sqrt())

    def _moments(self) -> Tensor:
        """Return second moments of gradients in 16 equally likely bins of t."""
        return self.proposal.table[0] / self.proposal.table[1]

    def _variances(self, design: str, count: int, repeats: int) -> Tensor:
        """Return the variance of each sample's features, of all parameters, over repetitions."""
        some = self.train.rows(torch.arange(32).repeat_interleave(repeats))
        found = self.features(self.draws(design, count))(some)
        return found.reshape(32, repeats, -1).double().var(dim=1).sum(dim=-1)

    def scores(
        self,
        draws: CARV,
        *,
        shared: bool,
        seed: int,
        projection: int | None = None,
        damping: float | None = None,
    ) -> Tensor:
        """Return scores of training digits for queries."""
        taken = self.features(draws, shared=shared, projection=projection, seed=seed)
        query, train = taken(self.query, "query"), taken(self.train)
        return (
            cosine_scores(query, train) if damping is None else trak_scores(query, train, damping)
        )

    def lds(self, scores: Tensor) -> float:
        """Return the mean over queries of the rank correlation with retrained models."""
        return float(linear_datamodeling_score(scores, self.masks, self.outputs).mean())


def measure(results: Results, study: Study, name: str, quick: bool) -> None:
    """Measure the scores of one prediction type."""
    seeds = 1 if quick else 5
    many = CARV(32 if quick else 1024, scope="sample", antithetic=True)
    reference = study.scores(many, shared=True, seed=99)
    cases = [(1, "uniform"), (4, "uniform"), (4, "strata"), (16, "uniform"), (16, "all")]
    for count, design in cases[:2] if quick else [*cases, (64, "all")]:
        for kind in ("shared", "independent"):
            for seed in range(seeds):
                draws = study.draws(design, count)
                scores = study.scores(draws, shared=kind == "shared", seed=seed)
                own = f"{name}/{{}}/{count} {design}/{kind}/{seed}"
                results.get(own.format("lds"), partial(study.lds, scores))
                results.get(own.format("rank"), partial(rank_correlation, scores, reference))
    draws = study.draws("all", 4 if quick else 16)
    for size in (512, 2048):
        scores = study.scores(draws, shared=True, seed=0, projection=size)
        results.get(f"{name}/projected/{size}", partial(study.lds, scores))
    for damping in (0.01, 0.1, 1.0):
        scores = study.scores(draws, shared=True, seed=0, projection=512, damping=damping)
        results.get(f"{name}/trak/{damping}", partial(study.lds, scores))


def measure_retraining(results: Results, folder: Path, prediction: str, quick: bool) -> None:
    """Measure the noise of features, and the LDS of scores of 64 draws, by the way of training."""
    for way, settings in WAYS.items():
        study = Study(prediction, folder, *size(quick), **settings)
        scores = study.scores(study.draws("strata, pairs", 64), shared=False, seed=0)
        results.get(f"{prediction}/retraining/{way}", partial(study.lds, scores))
        results.get(f"{prediction}/spread over t/{way}", study.spread)
        results.get(f"{prediction}/decline over t/{way}", study.decline)
        for count, design in product((4,) if quick else (4, 16, 64), DESIGNS[1:]):
            taken = partial(study.efficiency, design, count, 4 if quick else 16)
            results.add_interval(f"{prediction}/ECM, {way}/{count}/{design}", taken)


def size(quick: bool) -> tuple[int, int]:
    """Return the number of subsets and of steps."""
    return (4, 5) if quick else (32, 900)


def rank_correlation(scores: Tensor, reference: Tensor) -> float:
    """Return the mean over queries of the rank correlation of scores with others."""
    pairs = zip(scores, reference, strict=True)
    return float(torch.stack([spearman_corrcoef(a, b) for a, b in pairs]).mean())


def mean(results: Results, prefix: str) -> tuple[float, float]:
    """Return mean and standard error over seeds."""
    found = torch.tensor([x for name, x in results.rows.items() if name.startswith(f"{prefix}/")])
    return float(found.mean()), float(found.std(correction=0) / len(found) ** 0.5)


def report(results: Results, path: Path) -> None:
    """Print tables of all predictions, and draw LDS against draws."""
    names = list(dict.fromkeys(name.split("/")[0] for name in results.rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.5), squeeze=False)
    for name, panel in zip(names, axes[0], strict=True):
        keys = [key.split("/") for key in results.rows if key.startswith(f"{name}/")]
        for kind in dict.fromkeys(key[1] for key in keys if key[1].startswith("ECM")):
            print(f"\n{name}: {kind}: of features at equal draws, over uniform draws")
            for count in dict.fromkeys(key[2] for key in keys if key[1] == kind):
                own = {x: results.interval(f"{name}/{kind}/{count}/{x}") for x in DESIGNS[1:]}
                said = (
                    f"{x} {m:.2f} ({low:.2f} to {high:.2f})" for x, (m, low, high) in own.items()
                )
                print(f"  K = {count}: " + ", ".join(said))
        for kind in ("lds", "rank"):
            print(f"{name}: {kind}, independent → shared draws")
            for case in dict.fromkeys(key[2] for key in keys if key[1] == kind):
                pair = [
                    mean(results, f"{name}/{kind}/{case}/{x}") for x in ("independent", "shared")
                ]
                print(f"  K = {case}: " + " → ".join(f"{m:.3f} ± {e:.3f}" for m, e in pair))
        sizes = {key[2]: results.rows["/".join(key)] for key in keys if key[1] == "projected"}
        print(f"{name}: LDS by number of projected features: {sizes}")
        for kind in ("retraining", "spread over t", "decline over t"):
            ways = {key[2]: results.rows["/".join(key)] for key in keys if key[1] == kind}
            print(f"{name}: {kind}, by the way of training: {ways}")
        ridge = {key[2]: results.rows["/".join(key)] for key in keys if key[1] == "trak"}
        print(f"{name}: LDS with the inverse Gram matrix, by damping: {ridge}")
        for kind in ("independent", "shared"):
            cases = [
                c for c in dict.fromkeys(k[2] for k in keys if k[1] == "lds") if "strata" not in c
            ]
            found = [mean(results, f"{name}/lds/{case}/{kind}") for case in cases]
            panel.errorbar(
                cases, [m for m, _ in found], [e for _, e in found], marker="o", label=kind
            )
        panel.set(title=name, xlabel="draws of each sample", ylabel="linear datamodeling score")
        panel.tick_params(axis="x", rotation=30)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/attribution"))
    arguments = parser.parse_args()
    quick, folder = arguments.quick, arguments.folder
    results = Results(folder / "results.csv")
    for prediction in ("epsilon",) if quick else ("epsilon", "edm"):
        measure(results, Study(prediction, folder, *size(quick)), prediction, quick)
        measure_retraining(results, folder, prediction, quick)
    report(results, folder / "attribution.png")


if __name__ == "__main__":
    main()
