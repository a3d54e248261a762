"""Why are models of noise prediction harder to attribute than EDM's? One factor at a time.

The study of ``attribution.py`` with the loss weight of each prediction under the other one, with
several retrainings, and with features and query losses of a quarter of the times alone.

    python examples/attribution/loss_weights.py
    python examples/attribution/loss_weights.py --quick
"""

import argparse
from functools import partial
from typing import Any

import torch
from attribution import QUERIES, TRAINING, data, rank_correlation, size
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from lightning_vr import CARV, VP, Diffusion, GradientFeatures, ResidualMLP, UnitWeighting
from lightning_vr.teachers import (
    SubsetModels,
    cosine_scores,
    linear_datamodeling_score,
    subset_masks,
)

QUARTERS = 4


class Retrained:
    """Models retrained on random halves, and the one that was trained on all digits.

    Args:
        prediction: What the models predict.
        weight: The prediction whose error the loss weighs alike at all times; their own if None.
        sgd: Whether SGD trains them, in place of AdamW.
        seed: Seed of their batches and draws.
        quick: Whether to train a few steps alone.
    """

    def __init__(
        self,
        prediction: Any,
        weight: Any = None,
        *,
        sgd: bool = False,
        seed: int = 0,
        quick: bool = False,
    ) -> None:
        subsets, steps = size(quick)
        self.train, self.query = data(labelled=False)
        self.masks = subset_masks(TRAINING, subsets)
        masks = torch.cat([torch.ones(1, TRAINING, dtype=torch.bool), self.masks])
        torch.manual_seed(0)
        weighting = None if weight is None else UnitWeighting(weight, sigma_data=0.75)
        settings: Any = {"weighting": weighting, "sigma_data": 0.75}
        network = ResidualMLP(64, width=64, depth=2)
        self.model = Diffusion(network, VP(), prediction, **settings).eval()
        optimizer: Any = partial(torch.optim.AdamW, lr=1e-3)
        if sgd:
            optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        decay = partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps)
        self.models = SubsetModels(self.model, masks, optimizer, decay, seed)
        self.models.train(self.train, steps, batch_size=TRAINING)
        self.model.load_state_dict(self.models.parameters_of(0), strict=False)

    def outputs(self, count: int) -> Tensor:
        """Return minus the loss of each model for each query ``(subsets, queries)``."""
        draws = CARV(count, scope="sample", antithetic=True)
        losses = [self.models.losses(self.query.rows([i]), draws) for i in range(QUERIES)]
        return -torch.cat(losses, dim=1)[1:]

    def scores(self, count: int) -> Tensor:
        """Return scores of training digits for queries, by independent draws."""
        draws = CARV(count, scope="sample", antithetic=True)
        features = GradientFeatures(self.model, draws, projection=None, shared=False)
        return cosine_scores(features(self.query, "query"), features(self.train))

    def lds(self, scores: Tensor, outputs: Tensor) -> float:
        """Return the mean over queries of the linear datamodeling score."""
        return float(linear_datamodeling_score(scores, self.masks, outputs).mean())

    def quarters(self, count: int) -> list[tuple[float, float]]:
        """Return LDS and spread of outputs at the times of a quarter alone, lowest noise first."""
        whole, found = self.model.timesteps, []
        for i in range(QUARTERS):
            part = whole.between(i / QUARTERS, (i + 1) / QUARTERS)
            self.model.timesteps = self.models.model.timesteps = part
            outputs = self.outputs(count)
            found.append(
                (self.lds(self.scores(count // 2), outputs), float(outputs.std(dim=0).mean()))
            )
        self.model.timesteps = self.models.model.timesteps = whole
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    few, many = (4, 16) if quick else (64, 256)
    for prediction, other in (("epsilon", "edm"), ("edm", "epsilon")):
        for weight in (None, other):
            found = Retrained(prediction, weight, quick=quick)
            value = found.lds(found.scores(few), found.outputs(many))
            print(f"{prediction}, the weight of {weight or prediction}: LDS {value:.3f}")
            if weight is None:
                for i, (lds, spread) in enumerate(found.quarters(few)):
                    print(f"  times of quarter {i + 1}: LDS {lds:.3f}, outputs ± {spread:.5f}")

    runs = [Retrained("epsilon", sgd=True, seed=seed, quick=quick) for seed in range(3)]
    outputs = [run.outputs(many) for run in runs]
    values = [run.lds(run.scores(few), own) for run, own in zip(runs, outputs, strict=True)]
    alike = rank_correlation(outputs[0].T, outputs[1].T)
    print(f"epsilon, SGD, three retrainings: LDS {values}, two of them correlate by {alike:.3f}")


if __name__ == "__main__":
    main()
