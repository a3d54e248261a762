"""GradientVariance on corruptions of the user's own: masks of a masked language model."""

import csv

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import VP, GradientVariance, LogitNormal, Uniform
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.training.noisy_losses import GivenLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement

LENGTH = 6
NAMES = ("data", "mask rate", "mask pattern")


def tokens(count):
    return torch.randint(2, (count, LENGTH), generator=generator("tokens"))


class Masked(LightningModule):
    """A loss that is linear in the weights: ``g = mask (2 x - 1)``, and its moments are known."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(LENGTH))

    def training_step(self, batch, batch_idx):
        t = torch.rand(len(batch))
        mask = draw_mask(batch, t, torch.Generator().manual_seed(batch_idx))
        return masked_loss(self, batch, mask, t).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def draw_mask(x0, t, source):
    return torch.rand(x0.shape, generator=source, device=x0.device) < t[:, None]


def masked_loss(module, x0, mask, t):
    return (module.weights * mask * (2 * x0 - 1)).sum(1)


def test_components_of_masks_are_those_of_the_closed_form(z_score):
    found = []
    for i in range(40):
        loss = GivenLoss(Masked(), masked_loss, Uniform(), corruption=draw_mask)
        measurement = GradientMeasurement(loss, lambda *key, i=i: generator(i, *key), [0])
        clean = Clean(torch.randint(2, (24, LENGTH), generator=generator("clean", i)))
        found.append(torch.stack(measurement.per_sample(clean))[:, 0])
    # E t, E t² and (E t)² of uniform t are 1/2, 1/3 and 1/4, for each of the tokens
    expected = [LENGTH / 4, LENGTH / 12, LENGTH / 6, LENGTH / 2, 0.0]
    for values, exact in zip(torch.stack(found).mT, expected, strict=True):
        assert abs(z_score(values, exact)) < 4


def test_a_loss_with_a_fifth_argument_gets_the_labels_of_its_samples():
    def loss(module, x0, noise, t, clean):
        return module.weights[0] * clean.group

    given = GivenLoss(Masked(), loss, Uniform())
    clean = Clean(tokens(64).float(), group=torch.arange(64))
    found = GradientMeasurement(given, generator, [0]).per_sample(clean)
    # the gradient of a sample is its label, whatever its time and noise
    assert float(found.total[0]) == pytest.approx(64 * 65 / 12)
    assert float(found.data[0]) == pytest.approx(float(found.total[0]))


def fit(folder, callback):
    logger = CSVLogger(folder, name="", version="")
    trainer = quiet_trainer(callback, logger=logger, max_epochs=1, log_every_n_steps=1)
    trainer.fit(Masked(), DataLoader(tokens(32), 8))
    return trainer


def test_names_of_components_are_the_users_in_files_numbers_and_tables(
    tmp_path, capsys, no_pictures
):
    callback = GradientVariance(
        every_n_steps=1, noise_levels=2, loss=masked_loss, draw=draw_mask, components=NAMES
    )
    trainer = fit(tmp_path, callback)
    with (tmp_path / "gradient_variance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[1:5] == ["of", "name", "data", "data_error"]
    assert {"mask_rate", "mask_pattern", "mask_pattern_error"} < set(rows[0])
    assert [row["name"] for row in rows if row["of"] == "mask rate"][:2] == ["0.25", "0.75"]
    for name in ("mask_pattern", "mask_rate/t0.25", "total"):
        assert f"gradient_variance/{name}" in trainer.callback_metrics
    printed = " ".join(capsys.readouterr().out.split())
    assert "mask pattern %" in printed
    assert "noise level" not in printed


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b"),
        ("a", "b", "b"),
        ("a", "b", "total"),
        ("a", "b c", "b_c"),
        ("a", "b", "c/d"),
        "abc",
    ],
)
def test_names_that_files_and_loggers_do_not_take_are_refused(names):
    with pytest.raises(ValueError, match="`components` must be three different names"):
        GradientVariance(components=names)


def test_a_corruption_without_its_loss_or_without_rows_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="needs the `loss` that `draw`"):
        fit(tmp_path, GradientVariance(draw=draw_mask))
    flat = GradientVariance(loss=masked_loss, draw=lambda x0, t, source: t.sum())
    with pytest.raises(ValueError, match="`draw` must return a tensor with one row for each"):
        fit(tmp_path, flat)


def test_times_can_be_other_than_those_of_the_schedule(tmp_path, no_pictures):
    def plain(module, x0, noise, t):
        return (module.weights * noise).sum(1)

    def levels(**settings):
        callback = GradientVariance(
            every_n_steps=1,
            noise_levels=2,
            loss=plain,
            schedule=VP(),
            **settings,
            clean=lambda batch: batch.float(),
        )
        fit(tmp_path / "-".join(["fit", *settings]), callback)
        return callback.statistics.noise_levels

    density = LogitNormal(0.0, 0.5)
    expected = VP().noise_level(density(torch.tensor([0.25, 0.75]).double()))
    torch.testing.assert_close(levels(timesteps=density).double(), expected)
    assert not torch.allclose(levels().double(), expected)
