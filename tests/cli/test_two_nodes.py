"""Two nodes of one process each, on this machine: weights sharded, against DDP, and what follows.

The launchers are those of ``examples/scale/README.md``: torchrun on each node, and ``slurm.sh``.
Run by ``pytest -n 0 -m slow tests/cli/test_two_nodes.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jobs import environment, finish, start_fork
from safetensors.torch import load_file
from test_launchers import free_port

from lightning_vr import DiffusionModule
from lightning_vr.lifecycle.checkpoints import read_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]

SCRIPT = Path(__file__).parents[2] / "examples/scale/slurm.sh"
SHARDED = ["--trainer.strategy=sharded"]
FOLDERS = [
    "--trainer.strategy=ShardedStrategy",
    "--trainer.strategy.save_distributed_checkpoint=true",
]
SETTINGS = {
    "model": {
        "class_path": "DiffusionModule",
        "init_args": {
            "network": {"class_path": "ResidualMLP", "init_args": {"width": 16, "depth": 2}},
            "target": {"class_path": "STF", "init_args": {"references": "all", "sharded": True}},
            "draws": {"class_path": "CARV", "init_args": {"resamples": 2, "chunk_size": 12}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "sampler": {"class_path": "Sampler", "init_args": {"steps": 2}},
        },
    },
    "data": {
        "class_path": "EightGaussians",
        "init_args": {"num_samples": 160, "num_validation": 16, "batch_size": 16},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 8,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "job"}},
        "callbacks": [
            {"class_path": "EMA", "init_args": {"decay": 0.5, "relative_lengths": [0.1]}},
            {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
        ],
    },
}


def job(folder):
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


def on_two_nodes(folder, *arguments):
    """Fit as the README says: torchrun on each node."""
    place = f"--master_addr=127.0.0.1 --master_port={free_port()}".split()
    fit = ["fit", "--config=job.yaml", "--trainer.devices=1", "--trainer.num_nodes=2", *arguments]
    nodes = [
        ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}", *place] for node in range(2)
    ]
    check(finish([start_fork(folder, fit, torchrun=node) for node in nodes]))


def alone(folder, *arguments):
    """Run the command line in one process."""
    return check(finish([start_fork(folder, list(arguments))]))


def check(ended):
    statuses, said = ended
    assert set(statuses) == {0}, "\n".join(said)
    return "\n".join(said)


def last(folder):
    return max(folder.glob("runs/**/last.ckpt"), key=lambda path: path.stat().st_mtime)


def weights(path):
    return dict(DiffusionModule.load_from_checkpoint(path).named_parameters())


def averages(path):
    found = read_checkpoint(path)["averaging_state"]["weights"]
    return {f"{i}.{name}": x for i, each in enumerate(found) for name, x in each.items()}


def test_sharded_weights_on_two_nodes_are_those_of_ddp_and_go_on_from_the_last(tmp_path):
    ddp, whole, cut = (job(tmp_path / name) for name in ("ddp", "whole", "cut"))
    on_two_nodes(ddp, "--trainer.strategy=ddp")
    on_two_nodes(whole, *FOLDERS)
    rounding = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(weights(last(whole)), weights(last(ddp)), **rounding)
    torch.testing.assert_close(averages(last(whole)), averages(last(ddp)), **rounding)
    assert sorted(p.name for p in last(whole).iterdir()) == ["meta.pt", "rank-0.pt", "rank-1.pt"]
    assert [each.name for each in whole.glob("runs/job/*")] == ["version_0"]

    on_two_nodes(cut, *FOLDERS, "--trainer.max_steps=3")
    on_two_nodes(cut, *FOLDERS, "--ckpt_path=last")
    for read in (weights, averages):
        expected, found = read(last(whole)), read(last(cut))
        assert all(torch.equal(found[name], x) for name, x in expected.items())

    # a folder of both nodes in one process, whose settings may name the strategy
    config = "--config=job.yaml", "--ckpt_path=last", "--trainer.devices=1"
    for strategy in ([], SHARDED):
        said = alone(whole, "predict", *config, *strategy, "--num_samples=4")
        assert "samples.npz" in said
    alone(whole, "export", *config, *SHARDED, "--output=exported", "--format=safetensors")
    (exported,) = (whole / "exported").glob("*.safetensors")
    expected = weights(last(whole))
    for name, x in load_file(exported).items():
        assert torch.equal(expected[f"network.{name}"], x)
    alone(whole, "audit", *config, "--budget=1")
    assert list(whole.glob("runs/**/audit.json"))
    (status,), (said,) = finish([start_fork(whole, ["audit", *config, *SHARDED])])
    assert status != 0
    assert said.splitlines()[-1].endswith(
        "got 'sharded': use 'auto', or 'ddp' on several devices, whatever the run is trained with."
    )


SRUN = """#!/bin/bash
# two nodes with a task each
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NODEID=$rank "$@" & tasks+=($!)
done
for task in ${tasks[@]}; do wait $task || status=1; done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.txt
"""


LIMIT = """
import os
import signal

from lightning.pytorch import Callback


class Limit(Callback):
    def on_train_batch_start(self, trainer, *args):
        if "SLURM_RESTART_COUNT" in os.environ:
            return
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def slurm(folder, *arguments, **given):
    """Start ``slurm.sh`` with a ``srun`` and a ``scontrol`` of this machine."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    given |= {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "job",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PATH": os.pathsep.join(
            [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
    }
    return subprocess.Popen(
        ["bash", SCRIPT, "job.yaml", *arguments],
        cwd=folder,
        env=environment(given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_job_of_slurm_saves_before_its_limit_and_goes_on_when_it_is_queued_again(tmp_path):
    whole, cut = (job(tmp_path / name) for name in ("whole", "cut"))
    for folder in (whole, cut):
        (folder / "limit.py").write_text(LIMIT)
    check(finish([slurm(whole, *FOLDERS)]))

    given = [*FOLDERS, "--trainer.callbacks+=limit.Limit"]
    (status,), _ = finish([slurm(cut, *given)])
    assert status != 0
    assert (cut / "scontrol.txt").read_text() == "requeue 4711\n"
    (saved,) = cut.glob("runs/slurm-4711/hpc_ckpt_*")
    assert read_checkpoint(saved)["global_step"] == 4
    check(finish([slurm(cut, *given, SLURM_RESTART_COUNT="1")]))
    for read in (weights, averages):
        expected, found = read(last(whole)), read(last(cut))
        assert all(torch.equal(found[name], x) for name, x in expected.items())
