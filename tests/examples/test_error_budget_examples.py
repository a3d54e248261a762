"""The studies of the error budget and of objectives run in their quick modes."""

import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_error_budget_is_checked_on_mixtures(tmp_path, monkeypatch, capsys):
    arguments = ["orders", "narrow", "grids", "split", "--quick", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["error_budget.py", *arguments])
    runpy.run_path(str(EXAMPLES / "error_budget/error_budget.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Heun ,  32 steps" in printed
    assert "K =   34: biases" in printed
    second = [float(line.split()[-1]) for line in printed.splitlines() if "E w² m" in line]
    assert second[1] < second[0]
    for name in ("grids.png", "total_weight.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_objectives_are_compared(tmp_path, monkeypatch, capsys):
    arguments = ["--steps=2", "--seeds=1", "--width=8", "--repeats=1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare_objectives.py", *arguments])
    runpy.run_path(str(EXAMPLES / "objectives/compare_objectives.py"), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 11
    assert rows[1].count("+0.0 %") == 6  # the plain objective, compared with itself
    assert (tmp_path / "objectives.png").stat().st_size > 10_000
