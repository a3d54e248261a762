"""GradientVariance on modules with a frozen teacher, whose outermost part is views or samples."""

import csv
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from scenes import fit, scene, teacher, weights

from lightning_vr import CARV, DistributionMatching, GradientVariance

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


def matching():
    optimizer = partial(torch.optim.Adam, lr=0.01)
    return DistributionMatching(teacher(prediction="x0"), fake_steps=1, optimizer=optimizer)


@pytest.mark.parametrize(
    ("build", "outermost"), [(lambda: scene(CARV(2)), "view"), (matching, "sample")]
)
def test_components_are_measured_and_leave_the_run_as_it_is(build, outermost, tmp_path):
    watch = GradientVariance(every_n_steps=2, noise_levels=2)
    torch.manual_seed(0)
    watched = build()
    torch.manual_seed(0)
    plain = build()
    settings = {"length": 16, "batch_size": 2}
    logger = CSVLogger(tmp_path, name="")
    fit(watched, watch, logger=logger, log_every_n_steps=1, **settings)
    fit(plain, **settings)
    assert torch.equal(weights(watched), weights(plain))
    text = (tmp_path / "version_0/gradient_variance.csv").read_text()
    rows = [
        row for row in csv.DictReader(text.splitlines()) if row["step"] and row["of"] == "whole"
    ]
    assert rows
    for part in (outermost, "timestep", "noise"):
        assert any(float(row[part]) != 0 for row in rows), rows[0]
