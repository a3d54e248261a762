"""The example of cached latents runs as a reader runs it."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from lightning_vr.data import CachedLatents

EXAMPLE = Path(__file__).parents[2] / "examples/cached_latents/cached_latents.py"


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_latents_are_cached_trained_on_and_decoded(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--vae_width", "4", "--width", "8", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"ratio: \d", printed)
    assert 'CARV("auto"), cached: K = 1' in printed
    assert (tmp_path / "samples.png").stat().st_size > 1000
    data = CachedLatents(str(tmp_path / "cache"), batch_size=16, verify=True)
    data.setup()
    assert data.shape == (4, 8, 8)
