"""The comparison of a learned with a fixed variance runs as a reader runs it."""

import runpy
import shlex
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples/learned_variance/learned_variance.py"


def test_variances_are_compared_on_the_digits(monkeypatch, capsys):
    small = shlex.split("--steps 10 --width 8 --samples 40 --sets 2 --held-out 4 --timesteps 3")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *small])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "L_vlb" in printed
    for kind in ("learned", "beta", "beta_tilde"):
        bits, distance = (line for line in printed.splitlines() if f"steps, {kind:10}:" in line)
        assert "bits/dim" in bits
        assert "Fréchet distance" in distance
