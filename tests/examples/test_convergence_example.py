"""The study of convergence runs as a reader runs it."""

import re
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples/convergence"


def test_a_loop_of_diffusers_style_is_watched_and_bitwise_the_same(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--check", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["watch_a_loop.py", *arguments])
    runpy.run_path(str(FOLDER / "watch_a_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "At step 6 the training loss is" in printed
    assert "bitwise those of the loop without it: True" in printed
    assert (tmp_path / "convergence.png").stat().st_size > 10_000


def test_brackets_are_compared_with_the_exact_floor(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["brackets.py", "--quick"])
    runpy.run_path(str(FOLDER / "brackets.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for name in ("mixture", "heavy tails", "32 dimensions"):
        assert re.search(rf"{name}: [01] of 1 sets, \d of 8 levels", printed)
    assert printed.count("exact") == 8
