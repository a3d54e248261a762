"""GradientSignal under ``Trainer(strategy="ddp_fork", devices=2)``."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import VP, GradientSignal
from lightning_vr.core.rng import generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.usefixtures("no_pictures"),
]


class Plain(LightningModule):
    """``½ ‖net(x)‖²``."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loss(module, x0, noise, t):
    return module.net(x0 + t[:, None] * noise).square().sum(1)


class Save(Callback):
    """Writes what each rank ends with, from a seed of its own."""

    def __init__(self, folder):
        self.folder = folder

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(trainer.global_rank)

    def on_train_end(self, trainer, pl_module):
        found = {
            "weights": nn.utils.parameters_to_vector(pl_module.parameters()).detach(),
            "random": torch.get_rng_state(),
            "moments": [
                each.state_dict()["statistics"]
                for each in trainer.callbacks
                if isinstance(each, GradientSignal)
            ],
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def fit(folder, *callbacks):
    folder.mkdir()
    Trainer(
        accelerator="cpu",
        strategy="ddp_fork",
        devices=2,
        max_epochs=1,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, Save(folder)],
    ).fit(Plain(), DataLoader(torch.randn(16, 3, generator=generator("signal ranks")), 4))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_know_the_same_and_train_as_without_the_callback(tmp_path):
    watch = GradientSignal(every_n_steps=1, noise_levels=2, loss=loss, schedule=VP())
    found, plain = fit(tmp_path / "with", watch), fit(tmp_path / "without")
    first, second = (each["moments"][0] for each in found)
    assert float(first["weights"][0]) > 1
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one["weights"], other["weights"])
        assert torch.equal(one["random"], other["random"])
