"""Whether recommendations come true: the judge, and the run of the study."""

import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_vr.variance.intervals import Interval

AUDIT = Path(__file__).parents[2] / "examples/audit"


@pytest.fixture
def load(monkeypatch):
    """Import scripts of the study, which are gone afterwards."""
    monkeypatch.syspath_prepend(str(AUDIT))
    before = set(sys.modules)
    yield import_module
    for name in sys.modules.keys() - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == AUDIT:
            del sys.modules[name]


def run_on_a_path(load, speed, steps, goals=None):
    """Judge a run whose single weight grows by the step, ``speed`` times as fast as plain."""
    module = torch.nn.Linear(1, 1, bias=False)
    judge = load("judged_loss").JudgedLoss(10, 1, decays=[0.98, 0.0], goals=goals)
    judge.measure = lambda module: -module.weight.item()
    trainer = SimpleNamespace(global_step=0, should_stop=False)
    while trainer.global_step < steps and not trainer.should_stop:
        trainer.global_step += 1
        torch.nn.init.constant_(module.weight, speed * trainer.global_step)
        judge.on_train_batch_end(trainer, module)
        assert module.weight.item() == speed * trainer.global_step
    return judge


def test_a_run_on_the_same_path_is_judged_as_much_faster_as_it_is(load):
    plain = run_on_a_path(load, 1.0, 400)
    goals = plain.last_losses()
    fast = run_on_a_path(load, 4.0, 600, goals)
    compare = load("recommendations").fewer_steps
    fewer = {name: compare(plain, fast, name, goal) for name, goal in goals.items()}
    assert fewer["decay 0"] == pytest.approx(4, rel=0.01)
    assert fewer["length 0.1"] == pytest.approx(4, rel=0.02)
    # of 340 and 85 steps, and a lag of 50 that both have
    assert fewer["decay 0.98"] < 3.2
    assert fast.steps[-1] < 150  # there all have come to the goals


def test_a_power_function_average_lags_by_a_ninth_of_the_steps(load):
    judge = run_on_a_path(load, 1.0, 400)
    average = -judge.losses["length 0.1"][-1]
    assert 1 - average / 400 == pytest.approx(1 / 8.94, rel=0.02)  # γ = 6.94


def test_without_a_recommendation_the_best_finalist_is_tried(load):
    def estimator(name, estimate):
        return SimpleNamespace(name=name, predicted_speedup=Interval(estimate, 0.0, 2.0))

    rivals = [estimator("a", 1.1), estimator("b", 1.2), estimator("c", 1.3)]
    rivals.append(estimator("d", float("nan")))
    most_promising = load("recommendations").most_promising
    found = SimpleNamespace(finalists=rivals[:2], estimators=[estimator("current", 9.0), *rivals])
    assert most_promising(found).name == "b"
    found.finalists = []
    assert most_promising(found).name == "c"


def test_candidates_are_compared_with_training_and_not_done_twice(
    load, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(load("audit_against_training"), "EVALUATIONS", 2)
    load("workloads")
    draws = {"class_path": "CARV", "init_args": {"resamples": 1}}
    found = {"candidate": "strata", "is_recommended": False, "config": {"draws": draws}}
    found |= {"predicted": [1.2, 0.9, 1.3], "time_ratio": 0.9, "noise_ratio": 2.0}
    (tmp_path / "gaussians_16.json").write_text(json.dumps(found | {"advice": "Not certain."}))
    arguments = ["--only", "gaussians_16", "--fraction", "0.001", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["recommendations.py", *arguments, "--folder", str(tmp_path)])
    path = str(AUDIT / "recommendations.py")
    runpy.run_path(path, run_name="__main__")
    printed = capsys.readouterr().out
    assert "| gaussians_16 | 2 | strata | no | 1.20 (0.90 to 1.30) |" in printed
    assert "seed 1" in printed
    runpy.run_path(path, run_name="__main__")
    assert "seed 1" not in capsys.readouterr().out
