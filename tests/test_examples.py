"""The examples run as a reader would run them."""

import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_callbacks_attach_to_a_trainer_that_is_not_ours(tmp_path, monkeypatch):
    arguments = ["--max_epochs", "1", "--samples", "40", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["attach_to_a_trainer.py", *arguments])
    runpy.run_path(str(EXAMPLES / "attach_to_a_trainer.py"), run_name="__main__")
    folder = tmp_path / "attach" / "version_0"
    for name in ("target_variance.png", "target_variance.csv", "samples/step_00000011.png"):
        assert (folder / name).stat().st_size > 0
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "frechet_distance/digits_n40" in header
    assert "target_variance/dsm/s" in header
