"""A pilot on two ranks that time and measure different things."""

import pytest
import torch
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_vr import CARV, DiffusionModule, ResidualMLP
from lightning_vr.core.distributed import rank
from lightning_vr.core.rng import generator
from lightning_vr.training.resamples_pilot import ResamplesPilot
from lightning_vr.variance.accounting import CostModel, best_resamples

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


class Saved(DiffusionModule):
    folder = None

    def on_train_end(self):
        torch.save(self.draws.get_extra_state(), self.folder / f"{rank()}.pt")


def test_ranks_average_what_they_find_and_take_the_same_k(tmp_path, monkeypatch):
    monkeypatch.setattr(ResamplesPilot, "_seconds", lambda *_: (4.0 + 10 * rank(), 1.0))
    monkeypatch.setattr(ResamplesPilot, "_pass_seconds", lambda *_: (0.0, 1.0))
    monkeypatch.setattr(ResamplesPilot, "_components", lambda _: (1.0 + 2 * rank(), 32.0))
    model = Saved(ResidualMLP(2, width=8, depth=1), draws=CARV())
    model.folder = tmp_path
    trainer = quiet_trainer(devices=2, strategy="ddp_fork", max_steps=2)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(64, 2, generator=generator(0))), 16))
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert first == second
    assert first["pilot"] == {"step": 0, "between": 2.0, "within": 32.0}
    assert first["chosen"] == best_resamples(2.0, 32.0, CostModel(0, 9.0, 1.0), largest=16)
