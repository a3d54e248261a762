"""A run with a learned variance on two ranks is that of one process on the whole batches."""

import pytest
import torch
from lightning.pytorch import Callback
from support.gaussian_reverse import TwoHalves, scheduler
from support.points import Points, normal_points, two_classes
from support.trainers import quiet_trainer
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from lightning_vr import STF, Clean, DiffusionModule, LearnedVariance
from lightning_vr.core.types import Noised

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler`"),
]

RATE, STEPS = 0.1, 3
X0, LABELS = 0.5 * normal_points(24, "points of two ranks"), two_classes(24)
DATA = Points(X0, LABELS)


def build():
    return DiffusionModule(
        TwoHalves(3),
        scheduler(20),
        "epsilon",
        num_classes=2,
        label_dropout=0.2,
        target=STF("batch"),
        variance=LearnedVariance(weight=0.5),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    )


class Save(Callback):
    """Writes what each rank drew and where it ended to a file of its own."""

    def __init__(self, folder):
        self.folder, self.batches = folder, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        found = module.estimate
        kept = {"index": batch["index"], "noised": vars(found.noised), "bound": found.bound}
        self.batches.append(kept)

    def on_train_end(self, trainer, module):
        found = {"batches": self.batches, "weights": parameters_to_vector(module.parameters())}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def of_both(parts):
    """Return rows of both ranks, one after the other."""
    first, second = parts
    if isinstance(first, dict):
        return {name: of_both([first[name], second[name]]) for name in first}
    return None if first is None else torch.cat(parts)


def test_two_ranks_learn_the_variance_of_one_process(tmp_path):
    trainer = quiet_trainer(
        Save(tmp_path),
        max_steps=STEPS,
        strategy="ddp_fork",
        devices=2,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(build(), DataLoader(DATA, 4), DataLoader(DATA, 4))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    alone = build()
    optimizer = alone.optimizer(alone.parameters())
    for step in range(STEPS):
        found = of_both([rank["batches"][step] for rank in ranks])
        at, noised = found["index"], Noised(**found["noised"])
        clean = Clean(X0[at], LABELS[at], index=at)
        assert torch.equal(noised.x0, clean.x0)
        estimate = alone.compute_loss(noised, alone.target(noised, clean, torch.Generator()))
        torch.testing.assert_close(estimate.bound, found["bound"], rtol=2e-5, atol=2e-6)
        optimizer.zero_grad()
        estimate.loss.backward()
        optimizer.step()
    assert not torch.equal(alone.network.variance.weight, build().network.variance.weight)
    for rank in ranks:
        weights = parameters_to_vector(alone.parameters())
        torch.testing.assert_close(rank["weights"], weights, rtol=2e-5, atol=2e-6)
