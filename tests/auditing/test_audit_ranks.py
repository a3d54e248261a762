"""An audit on two ranks, as the command line starts them."""

import json
import os
import subprocess
import sys

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_vr import DiffusionModule, ResidualMLP, audit
from lightning_vr.data import EightGaussians

FLAGS = """
    --model.network ResidualMLP --model.network.width 16
    --data EightGaussians --data.num_samples 512 --data.batch_size 32
    --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp
    --budget 3
"""


def test_two_ranks_measure_together_and_one_of_them_writes(tmp_path):
    candidates = tmp_path / "candidates.yaml"
    shared = {"references": "all", "sharded": True}
    settings = {"batch": {"references": "batch"}, "shared": shared, "again": shared}
    targets = {n: {"class_path": "STF", "init_args": given} for n, given in settings.items()}
    listed = [{"name": name, "target": target} for name, target in targets.items()]
    candidates.write_text(json.dumps(listed))
    command = [sys.executable, "-m", "lightning_vr", "audit", f"--candidates={candidates}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *FLAGS.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("runs/**/audit.json")
    found = json.loads(path.read_text())
    assert found["batch"] == 64
    assert found["repetitions"] % 2 == 0
    assert found["repetitions"] >= 6
    # references of both ranks lower the variance
    batch, *alike = (each["efficiency"]["estimate"] for each in found["estimators"][1:])
    assert batch > 1
    # both have the references of all ranks, and the same
    assert alike[0] == alike[1] > 1
    assert done.stdout.count("The audit is in") == 1


def test_processes_that_cannot_return_a_result_are_refused():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False)
    with pytest.raises(MisconfigurationException, match="strategy='ddp'"):
        audit(DiffusionModule(ResidualMLP()), EightGaussians(), trainer=trainer)
