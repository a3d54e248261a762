"""An evaluation on two ranks is that of one process."""

import json

import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from support.gaussian_reverse import TwoHalves, scheduler
from support.held_out import TrainAndTest
from support.points import Points, normal_points
from support.trainers import quiet_trainer

from lightning_vr import (
    DDPM,
    DiffusionModule,
    Evaluation,
    FrechetDistance,
    LearnedVariance,
    Sampler,
)
from lightning_vr.callbacks import held_out_likelihood, sample_blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler`"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
]


def table(folder, **options):
    seed_everything(1, verbose=False)
    train, held_out = Points(normal_points(101, "train")), Points(normal_points(41, "test"))
    data = TrainAndTest(train, held_out, batch_size=16)
    settings = {"samples": 50, "repeats": 2, "subsets": 5, "subset_size": 20}
    evaluation = Evaluation(**settings, likelihood_samples=11, cache=folder / "cache")
    logger = CSVLogger(folder, name="", version="")
    frechet = FrechetDistance(samples=50, cache=folder / "cache")
    trainer = quiet_trainer(evaluation, frechet, logger=logger, **options)
    own = {"schedule": scheduler(20), "prediction": "epsilon", "variance": LearnedVariance()}
    sampler = Sampler(DDPM(clip_sample=True), steps=4)
    module = DiffusionModule(TwoHalves(), sampler=sampler, **own)
    trainer.test(module, datamodule=data, verbose=False)
    found = json.loads((folder / "evaluation.json").read_text())
    return found, float(trainer.callback_metrics["frechet_distance/identity_n50"])


@pytest.mark.parametrize("block", [20, 250])  # at 250 the second rank generates nothing
def test_two_ranks_write_the_table_of_one_process(block, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_blocks, "_BLOCK", block)
    monkeypatch.setattr(held_out_likelihood, "_BLOCK", 4)
    alone, distance = table(tmp_path / "one")
    together, same = table(tmp_path / "two", strategy="ddp_fork", devices=2)
    assert same == pytest.approx(distance, rel=1e-6)
    assert len(alone) == 6 + 3
    for one, two in zip(alone, together, strict=True):
        assert two["value"] == pytest.approx(one["value"], rel=1e-6)
        assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-5)
        for count in ("samples", "evaluations"):
            assert two[count] == one[count]
    # the cache of two ranks serves one
    again, _ = table(tmp_path / "two")
    assert again[0]["value"] == pytest.approx(alone[0]["value"], rel=1e-6)
