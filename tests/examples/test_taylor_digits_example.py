"""The study of Taylor control variates on digits runs as a reader runs it, and fits theory."""

import json
import runpy
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "examples/control_variates"


# torch warns when forward-mode derivatives are first used
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_taylor_control_variates_are_compared_on_digits(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["taylor_digits.py", *arguments])
    runpy.run_path(str(STUDY / "taylor_digits.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for row in ("plain", "Taylor 0, gate auto", "Taylor 0, open", "pairs", "strata", "Taylor 1"):
        assert f"\n{row}" in printed
    assert (tmp_path / "taylor_digits.png").stat().st_size > 10_000
    assert (tmp_path / "tables.txt").read_text() in printed

    found = json.loads((tmp_path / "results.json").read_text())
    assert {len(runs) for runs in found["training"].values()} == {1}
    rows = found["levels"]["step 4"]
    assert [(row["level"], row["order"]) for row in rows] == [
        (0.002, 0), (0.002, 1), (0.3, 0), (0.3, 1),
    ]  # fmt: skip
    # with hardly any noise the network is its polynomial, and the coefficient is 1
    for row in rows[:2]:
        assert row["fitted"][1] > 100
        assert abs(row["beta"][0] - 1) < 0.01
    # no fixed coefficient removes more of the noise component than the fitted one
    assert all(lost[0] < 0.05 for row in rows for lost in row["lost"])
