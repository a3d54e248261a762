"""``test`` on the command line evaluates, with or without a configured ``Evaluation``."""

import csv
import json

from commands import write

from lightning_vr import Evaluation, FrechetDistance


def test_a_test_writes_and_prints_the_table_without_being_asked_to(run, capsys):
    path = run("fit") / "checkpoints/last.ckpt"
    capsys.readouterr()
    folder = run("test", f"--ckpt_path={path}", "--model.sampler.steps=2")
    found = json.loads((folder / "evaluation.json").read_text())
    with (folder / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [row["value"] for row in found]
    assert len(found) == 6
    assert found[0]["samples"] == 1000
    printed = capsys.readouterr().out
    assert (folder / "evaluation.md").read_text() in printed
    assert "test/loss" in (folder / "metrics.csv").read_text()


def test_a_test_compares_where_the_frechet_distance_of_the_configuration_does(
    run, folder, monkeypatch
):
    features = {"network": {"class_path": "torch.nn.Flatten"}, "dimension": 2, "name": "own"}
    settings = {"features": {"class_path": "lightning_vr.metrics.Features", "init_args": features}}
    settings |= {"samples": 1001, "real_samples": 200, "conditions": {"label": [0]}}
    callback = {"class_path": "FrechetDistance", "init_args": settings}
    config = write(folder / "distance.yaml", trainer={"callbacks": [callback]})
    evaluated = []
    for kind in (FrechetDistance, Evaluation):
        monkeypatch.setattr(kind, "evaluate", lambda self, *_: evaluated.append(self))
    run("test", f"--config={config}")
    given, added = evaluated
    assert isinstance(added, Evaluation)
    assert (added.features.name, added.samples, added.real_samples) == ("own", 1001, 200)
    assert added.conditions is given.conditions is not None


def test_a_configured_evaluation_is_the_only_one(run, folder):
    likelihood = {"class_path": "Likelihood", "init_args": {"probes": 2}}
    settings = {"measures": ["bits_per_dimension"], "likelihood": likelihood}
    settings |= {"likelihood_samples": 8}
    callback = {"class_path": "Evaluation", "init_args": settings}
    config = write(folder / "evaluation.yaml", trainer={"callbacks": [callback]})
    path = run("fit") / "checkpoints/last.ckpt"
    tested = run("test", f"--ckpt_path={path}", f"--config={config}")
    (row,) = json.loads((tested / "evaluation.json").read_text())
    assert (row["measure"], row["samples"]) == ("bits_per_dimension", 8)
    assert row["settings"]["probes"] == 2


def test_too_little_data_is_one_line(refused):
    message = refused("test", "--data.num_validation=10")
    assert "at least 20 held-out samples" in message
    assert "got 10" in message
