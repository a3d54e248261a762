"""An audit and an error budget on two ranks, as the command line starts them."""

import json
import os
import sys
import warnings

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from support.forks import exit_code, let_lightning_fork

from lightning_vr import DiffusionModule, ResidualMLP, audit
from lightning_vr.cli import main
from lightning_vr.data import EightGaussians

FLAGS = """
    --model.network ResidualMLP --model.network.width 16
    --data EightGaussians --data.num_samples 512 --data.batch_size 32
    --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp
    --budget 1
"""


def on_the_command_line(folder, arguments):
    """Run the command line in a fork as its first rank, which starts the second one itself."""

    def run():
        os.chdir(folder)
        for stream, name in enumerate(("out.txt", "err.txt"), start=1):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        warnings.simplefilter("default")
        let_lightning_fork()
        sys.argv = ["lightning_vr", *arguments]
        os.environ["OMP_NUM_THREADS"] = "1"
        main()
        sys.stdout.flush()

    return exit_code(run, seconds=180)


def test_two_ranks_measure_together_and_one_of_them_writes(tmp_path):
    candidates = tmp_path / "candidates.yaml"
    shared = {"references": "all", "sharded": True}
    settings = {"batch": {"references": "batch"}, "shared": shared, "again": shared}
    targets = {n: {"class_path": "STF", "init_args": given} for n, given in settings.items()}
    listed = [{"name": name, "target": target} for name, target in targets.items()]
    candidates.write_text(json.dumps(listed))
    arguments = ["audit", f"--candidates={candidates}", *FLAGS.split()]
    code = on_the_command_line(tmp_path, arguments)
    assert code == 0, (tmp_path / "err.txt").read_text()[-2000:]
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
    assert (tmp_path / "out.txt").read_text().count("The audit is in") == 1


@pytest.mark.slow  # starts two processes that import everything
def test_an_error_budget_is_the_same_on_two_ranks_and_one_of_them_writes(tmp_path):
    own = "error_budget --samples 16 --sampler.solver Euler --sampler.steps 4"
    found = []
    for ranks in (1, 2):
        arguments = f"{own} {FLAGS}".replace("devices 2", f"devices {ranks}").split("--budget")[0]
        folder = tmp_path / str(ranks)
        folder.mkdir()
        code = on_the_command_line(folder, arguments.split())
        assert code == 0, (folder / "err.txt").read_text()[-2000:]
        (path,) = folder.glob("runs/**/error_budget.csv")
        found.append(path.read_text())
        assert (folder / "out.txt").read_text().count("The error budget is in") == 1
    assert found[0] == found[1]
    assert found[0].count("own,") == 4


@pytest.mark.parametrize(
    ("strategy", "message"),
    [("ddp_fork", "strategy='ddp'"), ("sharded", "got 'sharded': use 'auto', or 'ddp'")],
)
def test_strategies_that_cannot_be_measured_with_are_refused(strategy, message):
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    with pytest.raises(MisconfigurationException, match=message):
        audit(DiffusionModule(ResidualMLP()), EightGaussians(), trainer=trainer)
