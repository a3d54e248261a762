"""The study of masked sums runs as a reader runs it."""

import re
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples/masked_language/masked_language.py"


def test_ways_to_draw_masks_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", [SCRIPT.name, "--quick", "--ways", "plain", "all", "--folder", str(tmp_path)]
    )
    found = runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "mask pattern %" in printed
    for name in found["WAYS"]:
        assert len(re.findall(rf"  {name} +\d+\.\d\d ± \d+\.\d\d\n", printed)) == 2
    for name in ("plain", "all"):
        assert re.search(rf"  {name} +loss \d\.\d+ ± ", printed)
    assert (tmp_path / "masked_language.png").stat().st_size > 10_000
    header = (tmp_path / "plain_8/gradient_variance.csv").read_text().splitlines()[0]
    assert "mask_rate,mask_rate_error,mask_pattern" in header
