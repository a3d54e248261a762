"""Chunks of draws under DDP and accumulation, against all draws at once."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_vr import CARV, Clean, DiffusionModule, ResidualMLP
from lightning_vr.core.distributed import rank
from lightning_vr.core.rng import generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


class Trunk(DiffusionModule):
    """Trains an upstream with the network, and leaves its weights in a file of each rank."""

    def __init__(self, folder, chunk_size):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, trunk = ResidualMLP(2, width=8, depth=1), nn.Linear(2, 2)
            nn.init.normal_(network.project_out.weight, std=0.3)
        super().__init__(
            network,
            draws=CARV(4, chunk_size=chunk_size),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        )
        self.trunk, self.folder = trunk, folder

    def encode(self, batch):
        return Clean(self.trunk(batch[0]))

    def on_train_end(self):
        found = nn.utils.parameters_to_vector(self.parameters()).detach()
        torch.save(found, self.folder / f"{rank()}.pt")


def weights(folder, chunk_size):
    folder.mkdir()
    torch.manual_seed(1)
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        accumulate_grad_batches=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(
        Trunk(folder, chunk_size),
        DataLoader(TensorDataset(torch.randn(48, 2, generator=generator("x"))), 6),
    )
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]


def test_two_ranks_train_alike_in_chunks_and_at_once(tmp_path):
    whole, parts = weights(tmp_path / "whole", None), weights(tmp_path / "parts", 5)
    assert torch.equal(parts[0], parts[1])
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)
    before = nn.utils.parameters_to_vector(Trunk(tmp_path, None).parameters())
    moved = (parts[0] - before).abs()
    assert (moved[-6:] > 0).all(), "the trunk has not moved"
