"""What only a process of its own can show: light imports, and how the process ends."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import NETWORK, POINTS, SHORT
from support.configured import everything
from support.trainers import quiet_trainer

from lightning_vr.core.rng import generator
from lightning_vr.data import EightGaussians


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The end of such a process, and what it has shown before."""
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(everything(), EightGaussians(num_samples=256))
    checkpoint = tmp_path_factory.mktemp("fresh") / "module.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=False)

    wrong = ["fit", *NETWORK, *POINTS, *SHORT, "--model.network.dimension=3"]
    script = Path(__file__).with_name("fresh_process.py")
    process = [sys.executable, "-W", "error::UserWarning", str(script), str(checkpoint), *wrong]
    end = subprocess.run(process, capture_output=True, text=True, check=False)
    shown = [line for line in end.stdout.splitlines() if line.startswith('{"theirs"')]
    assert len(shown) == 1, end.stderr
    return SimpleNamespace(end=end, **json.loads(shown[0]))


def test_importing_the_package_and_asking_for_help_is_light(done):
    """Slow imports wait until they are needed."""
    assert set(done.theirs) <= {"matplotlib"}
    assert done.package == done.names == []
    assert done.rooms == [True, True, True]
    assert done.help == [0, []]
    assert "{fit,validate,test,predict,audit,cache,error_budget,export}" in done.end.stdout


def test_a_checkpoint_reloads_without_output(done):
    assert done.samples == [3, 2]
    assert done.said == ""


def test_a_key_gives_the_same_draws_in_any_process(done):
    expected = torch.randn(1000, generator=generator(7, "train", 0, 3))
    assert done.draw == expected.tolist()


def test_a_process_ends_with_the_line_and_a_status(done):
    assert done.end.returncode == 2
    assert "Traceback" not in done.end.stderr
    line = done.end.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "`network`" in line
    assert "shape of the data" in line
