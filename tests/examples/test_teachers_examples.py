"""The studies of the teachers in their quick mode: run with ``pytest -m slow``."""

import runpy
import sys
from pathlib import Path

import pytest

from lightning_vr.core import devices

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`max_epochs`"),
]


def run(monkeypatch, script, *arguments):
    monkeypatch.syspath_prepend(str((EXAMPLES / script).parent))
    monkeypatch.setattr(sys, "argv", [script, "--quick", *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_score_distillation_is_measured(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "score_distillation/score_distillation.py", "--folder", str(tmp_path))
    printed = capsys.readouterr().out
    assert "K = 8 weight, strata, pairs: variance" in printed
    assert "share of the oracle's reduction" in printed
    assert (tmp_path / "score_distillation.png").stat().st_size > 10_000
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert any(row.startswith('"quality/(2,1) uniform/3/0",') for row in rows)


def test_score_distillation_is_timed_against_a_loop_by_hand(monkeypatch, capsys):
    run(monkeypatch, "score_distillation/loop_by_hand.py")
    sizes = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert sizes == ["S = 5", "S = 8", "S = 16"]


def test_the_scene_of_score_distillation_is_audited(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "time", devices.time)  # the study has CPU seconds in its place
    run(monkeypatch, "score_distillation/audit_scene.py", "--folder", str(tmp_path))
    printed = capsys.readouterr().out
    assert "1 view, 8 weight, strata, pairs" in printed
    assert "view/timestep/noise in %" in printed
    assert (tmp_path / "audit" / "audit.png").stat().st_size > 10_000


@pytest.mark.parametrize("data", ["digits", "eight_gaussians"])
def test_distribution_matching_is_measured(tmp_path, monkeypatch, capsys, data):
    script = "distribution_matching/distribution_matching.py"
    run(monkeypatch, script, "--data", data, "--folder", str(tmp_path))
    printed = capsys.readouterr().out
    assert f"{data}/training/iid/0" in printed
    assert ("at fixed samples" in printed) == (data == "digits")
    assert (tmp_path / f"{data}.png").stat().st_size > 10_000


def test_attribution_is_measured(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "attribution/attribution.py", "--folder", str(tmp_path))
    printed = capsys.readouterr().out
    assert "ECM of features at equal draws" in printed
    assert "lds, independent → shared draws" in printed
    assert (tmp_path / "attribution.png").stat().st_size > 10_000


def test_loss_weights_of_attribution_are_exchanged(monkeypatch, capsys):
    run(monkeypatch, "attribution/loss_weights.py")
    printed = capsys.readouterr().out
    for prediction in ("epsilon", "edm"):
        for weight in ("epsilon", "edm"):
            assert f"{prediction}, the weight of {weight}: LDS" in printed
    assert printed.count("times of quarter") == 8
    assert "two of them correlate by" in printed
