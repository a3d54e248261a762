"""Networks of a checkpoint are looked at without memory before they are built."""

import pytest
import torch
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import DiffusionModule
from lightning_vr.data import EightGaussians


class Wide(nn.Module):
    """A network that notes on which device it is built, and may fail on one without memory."""

    devices = ()

    def __init__(self, width=4, reads_weights=False):
        super().__init__()
        self.width, self.reads_weights = width, reads_weights
        self.project = nn.Linear(2, 2)
        self.unused = nn.Linear(width, width)
        Wide.devices += (self.unused.weight.device.type,)
        if reads_weights:
            self.scale = float(self.unused.weight.detach().sum())

    def forward(self, x, t):
        return self.project(x)


class Adapted(DiffusionModule):
    """Saves a part of its network only, as fine-tuned models do."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        del checkpoint["state_dict"]["network.unused.weight"]


def checkpoint_of(module, path):
    """The file of a module that has trained for a step."""
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, EightGaussians(batch_size=16, num_samples=64, num_validation=16))
    trainer.save_checkpoint(path)
    Wide.devices = ()
    return path


def widened(path, width):
    """The same file with the description of another network."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["network"]["init_args"]["width"] = width
    torch.save(checkpoint, path)
    return path


def test_a_network_larger_than_its_checkpoint_is_refused_before_it_takes_memory(tmp_path):
    path = widened(checkpoint_of(DiffusionModule(Wide()), tmp_path / "wide.ckpt"), 10**7)
    with pytest.raises(ValueError, match=r"`network\.unused\.weight` has shape \(4, 4\) there"):
        DiffusionModule.load_from_checkpoint(path)
    assert set(Wide.devices) == {"meta"}


def test_a_network_as_large_as_its_checkpoint_is_built_once(tmp_path):
    path = checkpoint_of(DiffusionModule(Wide()), tmp_path / "wide.ckpt")
    DiffusionModule.load_from_checkpoint(path)
    assert Wide.devices == ("meta", "cpu")


def test_a_network_that_needs_memory_to_be_built_is_refused_once_it_is_built(tmp_path):
    path = checkpoint_of(DiffusionModule(Wide(reads_weights=True)), tmp_path / "wide.ckpt")
    DiffusionModule.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"`network\.unused\.weight` has shape \(4, 4\) there"):
        DiffusionModule.load_from_checkpoint(widened(path, 8))


def test_a_checkpoint_that_leaves_weights_out_on_purpose_still_loads(tmp_path):
    path = checkpoint_of(Adapted(Wide(64)), tmp_path / "adapted.ckpt")
    assert Adapted.load_from_checkpoint(path).network.unused.weight.shape == (64, 64)
