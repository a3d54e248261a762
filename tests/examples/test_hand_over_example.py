"""The example of a hand-over runs as a reader runs it, but for the second process."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.utils import dynamic_modules_utils

SCRIPT = Path(__file__).parents[2] / "examples/hand_over/hand_over.py"


@pytest.mark.parametrize("prediction", ["velocity", "edm"])
def test_a_model_is_handed_over_and_samples_the_same(
    tmp_path, monkeypatch, capsys, recwarn, prediction
):
    def here(command, check):
        code = command[2].replace('sys.modules["lightning_vr"] = None', "")
        monkeypatch.setattr(sys, "argv", command[2:])
        exec(code, {})

    # tests/pipelines has the process that cannot import the package: starting one takes seconds
    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.chdir(tmp_path)
    arguments = ["--prediction", prediction, "--steps", "1", "--folder", "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    kind = {"velocity": "DDPMPipeline", "edm": "DenoisingPipeline"}[prediction]
    assert f"sampled by a {kind}" in printed
    assert float(printed.split()[-1]) < 1e-4
    assert (tmp_path / "out/samples.png").stat().st_size > 100
