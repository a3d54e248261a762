"""A bank whose copies of samples are not those that training sees is warned of in every mode."""

import logging

import pytest
import torch
from lightning.pytorch import Callback
from support.networks import small_mlp
from support.points import normal_points
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_vr import STF, Clean, DiffusionModule
from lightning_vr.training import reference_bank

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

POINTS = normal_points(40, "points of a bank")


class Plain(Dataset):
    """Samples without their positions."""

    def __len__(self):
        return len(POINTS)

    def __getitem__(self, i):
        return {"x0": POINTS[i]}


class Mirrored(Plain):
    """Each sample, or its mirror image."""

    def __getitem__(self, i):
        return {"x0": POINTS[i] * (1 if torch.rand(()) < 0.5 else -1)}


class Indexed(Plain):
    def __getitem__(self, i):
        return {"x0": POINTS[i], "index": i}


class Random(DiffusionModule):
    """Draws a latent of each sample, as an autoencoder does."""

    def encode(self, batch):
        x0 = batch["x0"]
        return Clean(x0 + 0.3 * torch.randn_like(x0), index=batch.get("index"))


class Record(Callback):
    """Keeps what a global random number and the samples are in each batch."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.found += [module.estimate.noised.x0, torch.rand(())]


def fit(kind=DiffusionModule, data=None, references=8, **options):
    torch.manual_seed(1)
    module, record = kind(small_mlp(std=0.3), target=STF(references)), Record()
    loader = DataLoader(data or Plain(), batch_size=8, shuffle=True, **options)
    quiet_trainer(record, max_epochs=1).fit(module, loader)
    return [*record.found, nn.utils.parameters_to_vector(module.parameters()).detach()]


@pytest.fixture
def warned(caplog):
    def count(*args, **kwargs):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            fit(*args, **kwargs)
        return sum("differ from the bank's copies" in each.message for each in caplog.records)

    return count


@pytest.mark.parametrize(
    ("kind", "data"),
    [(Random, Plain()), (DiffusionModule, Mirrored()), (Random, Indexed())],
    ids=["encode", "data set", "encode, with indices"],
)
def test_a_sample_that_is_another_each_time_warns_once(kind, data, warned):
    assert warned(kind, data) == 1


def test_random_samples_of_workers_warn(warned):
    assert warned(data=Mirrored(), num_workers=1) == 1


def test_samples_that_are_the_same_each_time_do_not_warn(warned):
    assert warned() == warned(data=Indexed()) == warned(data=Indexed(), references="all") == 0


def test_references_from_the_batch_need_no_comparison(warned):
    assert warned(Random, references="batch") == 0


@pytest.mark.parametrize("kind", [DiffusionModule, Random])
def test_training_is_the_same_with_and_without_the_comparison(kind, monkeypatch):
    compared = fit(kind)
    monkeypatch.setattr(reference_bank, "compare_by_reading_again", lambda *_: None)
    plain = fit(kind)
    assert all(torch.equal(*pair) for pair in zip(compared, plain, strict=True))
