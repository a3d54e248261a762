"""Captions of digits, as a reader runs the study."""

import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples/captions/captioned_digits.py"


def test_digits_are_trained_on_captions_and_judged_under_guidance(tmp_path, monkeypatch, capsys):
    short = ["--steps", "3", "--width", "8", "--samples", "10", "--sampler_steps", "2"]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *short, "--folder", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = json.loads((tmp_path / "guidance.json").read_text())
    assert [row["guidance"] for row in table] == [1, 2, 3, 5]
    assert all(0 <= row["right"] <= 1 for row in table)
    assert "show the digit of their caption" in capsys.readouterr().out
    assert len(list(tmp_path.glob("**/samples/*.png"))) == 3
