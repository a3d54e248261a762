"""How much of what the best proposal would save does the weight save, early and late in training?

The second moment of a draw's gradient under a proposal q is ``E_q[(p/q)² w² m]`` with the weight w
on the squared error of the network and m the moment at unit weight. Measured is m in 16 equally
likely bins of t; from it follow the moments under q = p, under q ∝ p w (``WeightProposal``), and
under the best ``q ∝ p w sqrt(m)``, which knows m. Intervals are over networks of three seeds.
Source: Bettencourt et al. 2026, arXiv 2605.21489, equation 24, table 6, figures 13 and 23.
"""

import torch
from digits_models import clean_digits, model
from study import Study, Table, interval, markdown
from torch import Tensor

from lightning_vr import Diffusion
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.process import DistillationWeighting, MinSNRWeighting, UnitWeighting, Weighting
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement

BINS = 16
WEIGHTS: dict[str, Weighting] = {
    "unit weight on epsilon": UnitWeighting("epsilon"),
    "score distillation, alpha sigma²": DistillationWeighting(),
    "score distillation, sigma²": DistillationWeighting("sigma2"),
    "min-SNR": MinSNRWeighting(),
    "unit weight on x0": UnitWeighting("x0"),
}


def run(study: Study) -> None:
    keys = ("step", "seed", "weight")
    table = Table(study.folder / "carv_proposals.csv", keys, ("best", "by_weight"))
    steps, seeds, size = ((2, 4), (0, 1), 32) if study.is_quick else ((50, 400), (0, 1, 2), 640)
    for seed in seeds:
        for step in reversed(steps):  # the longest training keeps all
            if table.has(step, seed, next(iter(WEIGHTS))):
                continue
            found, _ = model("vp, n = 1", seed, step, study)
            study.check_time()
            moments = second_moments(found, size, seed)
            for name, weighting in WEIGHTS.items():
                best, by_weight = left(found, weighting, moments)
                table.add(step=step, seed=seed, weight=name, best=best, by_weight=by_weight)
    report(table, steps)


def second_moments(found: Diffusion, size: int, seed: int) -> Tensor:
    """Return ``E ‖g‖²`` of the parameters' gradient at unit weight on epsilon in each bin."""
    measurement = GradientMeasurement(DiffusionLoss(found), generator, parameter_groups(found)[1])
    parts = measurement.per_sample_by_level(clean_digits(size, f"moments {seed}"), BINS, seed)
    return torch.stack([part.second_moment[0] for part in parts]).double()


def left(found: Diffusion, weighting: Weighting, moments: Tensor) -> tuple[float, float]:
    """Return the second moments under the best proposal and under the weight, over that of p."""
    t = found.objective.times(BINS)
    b = found.objective.coefficients(t).b.double()
    w = weighting(found.schedule, t).double() * b**2
    plain = (w**2 * moments).mean()
    best = (w * moments.sqrt()).mean() ** 2
    by_weight = w.mean() * (w * moments).mean()
    return float(best / plain), float(by_weight / plain)


def report(table: Table, steps: tuple[int, ...]) -> None:
    rows = []
    for name in WEIGHTS:
        for step in steps:
            best, by_weight = (
                table.select(key, step=step, weight=name) for key in table.columns[3:]
            )
            shares = [(1 - a) / (1 - b) for a, b in zip(by_weight, best, strict=True)]
            gains = interval([1 / x for x in best], 2), interval([1 / x for x in by_weight], 2)
            rows.append((name, step, *gains, interval([100 * x for x in shares], 0) + " %"))
    header = ("weight", "step", "p over best q", "p over q ∝ p w", "share of the best saving")
    print(markdown(header, rows))
