"""Several processes, however they are started: by Lightning, by torchrun, by SLURM's srun.

All of them give the same weights, bit by bit: two terms have the same sum in either order.
"""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import yaml

SECONDS = 120
"""Seconds after which a job counts as hanging."""

SETTINGS = {
    "model": {
        "class_path": "DiffusionModule",
        "init_args": {
            "network": {"class_path": "ResidualMLP", "init_args": {"width": 16, "depth": 1}},
            "target": {"class_path": "STF", "init_args": {"references": "all", "sharded": True}},
        },
    },
    "data": {
        "class_path": "EightGaussians",
        "init_args": {"num_samples": 129, "num_validation": 16, "batch_size": 16},
    },
    "trainer": {
        "accelerator": "cpu",
        "strategy": "ddp",
        "max_epochs": 1,
        "accumulate_grad_batches": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
    },
}

BROKEN = """
import functools
import os
import time

import torch

from lightning_vr.data import EightGaussians


class Broken(EightGaussians):
    def train_dataloader(self):
        loader, rank = super().train_dataloader(), str(self.trainer.global_rank)
        if rank in os.environ["BROKEN_RANK"]:
            loader.collate_fn = Failing(loader.collate_fn)
        if os.environ["BROKEN_RANK"] == "01" and rank == "0":
            torch.save = functools.partial(slow, torch.save)
        return loader


def slow(save, *arguments):  # longer than Lightning lets a rank live whose other has ended
    time.sleep(8)
    save(*arguments)


class Failing:
    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, samples):
        self.count += 1
        if self.count == int(os.environ["BROKEN_BATCH"]):
            raise OSError("the disk is gone")
        return self.function(samples)
"""


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def command(*flags, launcher=()):
    return [sys.executable, *launcher, "-m", "lightning_vr", "fit", "--config=job.yaml", *flags]


def torchrun(*flags):
    return ["-m", "torch.distributed.run", *flags]


def run_in(folder, *commands, environments=None):
    """Start commands in a folder and wait for all of them; return their statuses and outputs."""
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "broken.py").write_text(BROKEN)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PL_", "MASTER_"))}
    started = [
        subprocess.Popen(
            each,
            cwd=folder,
            env={**own, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for each, environment in zip(commands, environments or [{}] * len(commands), strict=True)
    ]
    end = time.monotonic() + SECONDS
    try:
        said = [each.communicate(timeout=max(1, end - time.monotonic()))[0] for each in started]
    finally:
        for process in started:
            end_group(process)
    return [process.returncode for process in started], said


def end_group(process):
    """Torchrun has sessions of its own for its processes, and ends them if it is asked to end."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)


def slurm(rank, port):
    """What srun sets for one of two tasks on nodes of their own."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "gaussians",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "MASTER_PORT": str(port),
    }


def two_nodes(folder):
    flags, port = ("--trainer.devices=1", "--trainer.num_nodes=2"), free_port()
    where = "--master_addr=127.0.0.1", f"--master_port={port}"
    size = "--nnodes=2", "--nproc_per_node=1"
    nodes = [torchrun(*size, f"--node_rank={node}", *where) for node in range(2)]
    return run_in(folder, *[command(*flags, launcher=node) for node in nodes])


def srun(folder):
    task, port = command("--trainer.devices=1", "--trainer.num_nodes=2"), free_port()
    return run_in(folder, task, task, environments=[slurm(rank, port) for rank in range(2)])


def one_machine(folder, flags=(), launcher=(), broken=(1, 3)):
    rank, batch = (str(number) for number in broken)
    environment = {"BROKEN_RANK": rank, "BROKEN_BATCH": batch, "PYTHONPATH": str(folder)}
    one = command("--trainer.devices=2", *flags, launcher=launcher)
    return run_in(folder, one, environments=[environment])


RAISES = "--data=broken.Broken"
SAVES = "--trainer.callbacks.save_on_exception=true"
TORCHRUN = torchrun("--standalone", "--nproc_per_node=2")
JOBS = {
    "lightning": one_machine,
    "lightning, raises": partial(one_machine, flags=[RAISES]),
    # once training has begun, after the five batches that fill the bank
    "raises and saves": partial(one_machine, flags=[RAISES, SAVES], broken=(1, 8)),
    "first raises and saves": partial(one_machine, flags=[RAISES, SAVES], broken=(0, 8)),
    "first raises and saves, as others": partial(
        one_machine, flags=[RAISES, SAVES, "--data.num_samples=128"], broken=("01", 7)
    ),
    "torchrun": partial(one_machine, launcher=TORCHRUN),
    "torchrun, raises": partial(one_machine, flags=[RAISES], launcher=TORCHRUN),
    "torchrun, two nodes": two_nodes,
    "srun": srun,
}

WAITING = ["raises and saves", "first raises and saves, as others"]
"""Jobs of which one rank waits for long until Lightning ends it."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Folder, statuses and outputs of a job: those that mostly wait run beside the others."""
    folders = {name: tmp_path_factory.mktemp("job") for name in JOBS}
    with ThreadPoolExecutor(len(WAITING) + 1) as pool:
        submit = functools.cache(lambda name: pool.submit(JOBS[name], folders[name]))
        for name in WAITING:
            submit(name)
        yield lambda name: (folders[name], *submit(name).result())


def weights(folder):
    (path,) = folder.glob("runs/**/last.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", [name for name in JOBS if "raises" not in name])
def test_two_processes_train_to_the_same_weights_however_they_are_started(name, jobs):
    folder, statuses, said = jobs(name)
    assert set(statuses) == {0}, "\n".join(said)
    assert sum(each.count("MEMBER: 2/2") for each in said) == 1
    found, expected = weights(folder), weights(jobs("lightning")[0])
    assert found.keys() == expected.keys()
    for parameter in expected:
        assert torch.equal(found[parameter], expected[parameter]), parameter


@pytest.mark.parametrize("name", [name for name in JOBS if "raises" in name])
def test_a_rank_that_raises_ends_the_job(name, jobs):
    folder, (status,), (said,) = jobs(name)
    assert status != 0
    assert "the disk is gone" in said
    if name in ("lightning, raises", "raises and saves"):
        assert "error: rank 1 ended; see its message" in said
        assert status == 1
    saved = list(folder.glob("runs/**/last.ckpt"))
    if "saves" not in name:
        assert not saved
    elif "first" in name:
        assert torch.load(saved[0], weights_only=True)["global_step"] == 1
