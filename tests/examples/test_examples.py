"""The examples run as a reader runs them."""

import json
import runpy
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import lightning_vr
from lightning_vr import DiffusionModule, ResidualMLP, Sampler, TargetVariance
from lightning_vr.data import Digits, EightGaussians

EXAMPLES = Path(__file__).parents[2] / "examples"


class Flat(torch.nn.Module):
    """An MLP on the pixels of a digit."""

    def __init__(self, num_class_embeds):
        super().__init__()
        self.num_class_embeds = num_class_embeds
        self.network = ResidualMLP(64, width=16, depth=1, num_class_embeds=num_class_embeds)

    def forward(self, x, t, class_labels):
        return self.network(x.flatten(1), t, class_labels).reshape(x.shape)


def test_a_checkpoint_of_digits_is_judged(tmp_path, monkeypatch, capsys):
    module = DiffusionModule(Flat(11), num_classes=10, sampler=Sampler(steps=2))
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, Digits())
    trainer.save_checkpoint(tmp_path / "digits.ckpt")
    arguments = [str(tmp_path / "digits.ckpt"), "--samples", "50"]
    monkeypatch.setattr(sys, "argv", ["judge_digits.py", *arguments])
    runpy.run_path(str(EXAMPLES / "digits/judge_digits.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "93.6% of the real digits" in printed
    assert "of 50" in printed


def test_an_audit_is_compared_with_training(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES / "audit"))
    monkeypatch.setitem(sys.modules, "workloads", import_module("workloads"))
    example = runpy.run_path(str(EXAMPLES / "audit/audit_against_training.py"))
    settings = example["main"].__globals__
    monkeypatch.setitem(settings, "EVALUATIONS", 4)
    monkeypatch.setitem(settings, "WORKLOADS", {"eight_gaussians": 12})
    monkeypatch.setitem(settings, "network", lambda _: ResidualMLP(2, width=16, depth=1))

    def few_points(batch_size, **_):
        return EightGaussians(batch_size=batch_size, num_samples=2048, num_validation=256)

    monkeypatch.setitem(settings, "EightGaussians", few_points)
    arguments = ["--seeds", "2", "--budget", "0.1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["audit_against_training.py", *arguments])
    example["main"]()
    printed = capsys.readouterr().out
    assert "ECM" in printed
    assert "realised" in printed
    assert (tmp_path / "audit_against_training.png").stat().st_size > 10_000
    assert (tmp_path / "eight_gaussians/audit.md").exists()


@pytest.mark.slow
def test_intervals_of_audits_are_compared_with_many_repetitions(tmp_path, monkeypatch, capsys):
    arguments = ["--job", "eight_gaussians", "--audits", "1", "--reference", "4"]
    monkeypatch.setattr(sys, "argv", ["coverage.py", *arguments, "--folder", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "audit/coverage.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for repetitions in (5, 10):
        assert f"| eight_gaussians | {repetitions} | STF(64) | 1 |" in printed


@pytest.mark.usefixtures("no_pictures")
def test_the_callbacks_attach_to_a_trainer_that_is_not_ours(tmp_path, monkeypatch):
    few = partial(TargetVariance, noise_levels=4, samples=64)
    monkeypatch.setattr(lightning_vr, "TargetVariance", few)
    arguments = ["--max_epochs", "1", "--samples", "40", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["attach_to_a_trainer.py", *arguments])
    runpy.run_path(str(EXAMPLES / "attach_to_a_trainer.py"), run_name="__main__")
    folder = tmp_path / "attach" / "version_0"
    curves = ("target_variance", "gradient_variance", "convergence")
    tables = [f"{name}.{kind}" for name in curves for kind in ("png", "csv")]
    for name in (*tables, "samples/step_00000011.png"):
        assert (folder / name).stat().st_size > 0
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "frechet_distance/digits_n40" in header
    assert "gradient_variance/timestep" in header
    assert "dsm,dsm_error" in (folder / "target_variance.csv").read_text()
    assert (folder / "gradient_variance.csv").read_text().count(",whole,all,") > 0


def test_latents_are_resampled_where_encoding_is_expensive(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["latent_resampling.py", *arguments])
    runpy.run_path(str(EXAMPLES / "expensive_encode/latent_resampling.py"), run_name="__main__")
    assert "encoding costs" in capsys.readouterr().out
    assert (tmp_path / "latent_resampling.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "results.json").read_text())["summary"]
    for row in found["rows"]:
        assert row["variance"][1] <= row["variance"][0] <= row["variance"][2]
        assert 0.2 < row["product"] / row["predicted_product"] < 5
    variances = [row["variance"][0] for row in found["rows"] if row["kind"] == "independent"]
    assert variances == sorted(variances, reverse=True)
    assert all(1 <= k <= 16 for each in found["auto"].values() for k in each["resamples"])


def test_strata_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "expensive_encode/show_strata.py"), run_name="__main__")
    assert (tmp_path / "runs" / "strata.png").stat().st_size > 10_000


def test_learned_proposals_are_compared_with_the_best(monkeypatch, capsys):
    arguments = ["--steps", "2", "--batches", "1", "--width", "8"]
    monkeypatch.setattr(sys, "argv", ["learned_proposals.py", *arguments])
    runpy.run_path(str(EXAMPLES / "expensive_encode/learned_proposals.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith(("EDM", "VE", "VP", "rectified"))]
    assert len(rows) == 4
    assert all(0 < float(row.split()[-3]) <= 1.001 for row in rows)


def test_the_slope_of_a_soak_is_that_of_its_second_half():
    slope = runpy.run_path(str(EXAMPLES / "reliability/soak.py"))["slope"]
    rising = [(6.0 * i, 100 + 0.05 * i + (50 if i < 5 else 0)) for i in range(21)]
    assert slope(rising) == pytest.approx(0.5)
    assert slope([(1.0, 100.0)]) == 0


@pytest.mark.usefixtures("no_pictures")
def test_a_soak_survives_its_faults(tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((EXAMPLES.parent / "configs/eight_gaussians.yaml").read_text())
    config["data"]["init_args"] |= {"num_samples": 600, "batch_size": 64}
    config["model"]["init_args"]["target"]["init_args"]["references"] = 64
    config["model"]["init_args"]["network"]["init_args"] |= {"width": 16, "depth": 1}
    fewer = {
        "TargetVariance": {"noise_levels": 4, "samples": 64},
        "GradientVariance": {"noise_levels": 2, "samples": 4},
        "Convergence": {"noise_levels": 2, "samples": 16},
    }
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] in fewer:
            callback["init_args"] = fewer[callback["class_path"]]
        if callback["class_path"] in ("FrechetDistance", "SampleGrid"):
            callback["init_args"]["samples"] = 64
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    example = runpy.run_path(str(EXAMPLES / "reliability/soak.py"))
    settings = example["main"].__globals__
    monkeypatch.setitem(settings, "CYCLE", 100)
    monkeypatch.setitem(settings["DATA"], "digits", tmp_path / "small.yaml")
    monkeypatch.setattr(sys, "argv", ["soak.py", "--steps", "52", "--folder", str(tmp_path)])
    save = torch.save
    example["main"]()
    assert torch.save is save
    printed = capsys.readouterr().out
    for fault in ("NaN samples", "checkpoints", "pictures"):
        assert f"'{fault}': " in printed
    for text in (
        "resident: ",
        " MB a minute",
        "left out",
        "could not be written",
        "no route to the logger",
    ):
        assert text in printed
