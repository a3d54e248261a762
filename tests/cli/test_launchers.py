"""Several processes, however they are started: by Lightning, by torchrun, by SLURM's srun.

All of them give the same weights, bit by bit: two terms have the same sum in either order.
"""

import functools
import re
import socket
from functools import partial

import pytest
import torch
import yaml
from jobs import finish, start_fork, start_fresh

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")

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
import re
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
    time.sleep(float(os.environ["SECONDS_TO_SAVE"]))
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


FIT = ["fit", "--config=job.yaml"]
TWO_NODES = [*FIT, "--trainer.devices=1", "--trainer.num_nodes=2"]


def torchrun_on_two_nodes(start):
    where = "--master_addr=127.0.0.1", f"--master_port={free_port()}"
    size = "--nnodes=2", "--nproc_per_node=1"
    nodes = [[*size, f"--node_rank={node}", *where] for node in range(2)]
    return [start(arguments=TWO_NODES, torchrun=node) for node in nodes]


def srun(start):
    port = free_port()
    return [start(arguments=TWO_NODES, **slurm(rank, port)) for rank in range(2)]


def one_machine(start, flags=(), torchrun=(), broken=(1, 3)):
    rank, batch = (str(number) for number in broken)
    # Lightning looks after 5 s at fresh interpreters, and here after 1 s at forks
    seconds = "8" if start.func is start_fresh else "3"
    given = {"BROKEN_RANK": rank, "BROKEN_BATCH": batch, "SECONDS_TO_SAVE": seconds}
    arguments = [*FIT, "--trainer.devices=2", *flags]
    return [start(arguments=arguments, torchrun=torchrun, **given)]


RAISES = "--data=broken.Broken"
SAVES = "--trainer.callbacks.save_on_exception=true"
TORCHRUN = ["--standalone", "--nproc_per_node=2"]
JOBS = {
    # of these one rank waits for long until Lightning ends it: they run beside the others
    # once training has begun, after the five batches that fill the bank
    "raises and saves": partial(one_machine, flags=[RAISES, SAVES], broken=(1, 8)),
    "first raises and saves, as others": partial(
        one_machine, flags=[RAISES, SAVES, "--data.num_samples=128"], broken=("01", 7)
    ),
    "lightning": one_machine,
    "lightning, raises": partial(one_machine, flags=[RAISES]),
    "first raises and saves": partial(one_machine, flags=[RAISES, SAVES], broken=(0, 8)),
    "torchrun": partial(one_machine, torchrun=TORCHRUN),
    "torchrun, raises": partial(one_machine, flags=[RAISES], torchrun=TORCHRUN),
    "torchrun, two nodes": torchrun_on_two_nodes,
    "srun": srun,
}
WAITING = list(JOBS)[:2]
DONE = [name for name in JOBS if "raises" not in name]
RAISING = [name for name in JOBS if "raises" in name]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Folder, statuses and outputs of a job, whose processes are started by a function."""

    @functools.cache
    def started(name, start):
        folder = tmp_path_factory.mktemp("job")
        (folder / "job.yaml").write_text(yaml.safe_dump(SETTINGS))
        (folder / "broken.py").write_text(BROKEN)
        return folder, JOBS[name](partial(start, folder))

    @functools.cache
    def job(name, start=start_fork):
        for each in WAITING if name in RAISING else ():
            started(each, start)
        folder, processes = started(name, start)
        return folder, *finish(processes)

    return job


def weights(folder):
    (path,) = folder.glob("runs/**/last.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", DONE)
def test_two_processes_train_to_the_same_weights_however_they_are_started(name, jobs):
    check_weights(jobs(name), jobs("lightning"))


@pytest.mark.slow
@pytest.mark.parametrize("name", DONE)
def test_fresh_interpreters_train_to_the_same_weights_however_they_are_started(name, jobs):
    check_weights(jobs(name, start_fresh), jobs("lightning"))


def check_weights(job, reference):
    folder, statuses, said = job
    assert set(statuses) == {0}, "\n".join(said)
    # what other tests have imported may log each line once more, behind its level
    members = [re.findall("^Initializing distributed.*MEMBER: 2/2", each, re.M) for each in said]
    assert sum(map(len, members)) == 1
    found, expected = weights(folder), weights(reference[0])
    assert found.keys() == expected.keys()
    for parameter in expected:
        assert torch.equal(found[parameter], expected[parameter]), parameter


@pytest.mark.parametrize("name", RAISING)
def test_a_rank_that_raises_ends_the_job(name, jobs):
    check_end(name, jobs(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", RAISING)
def test_a_rank_that_raises_ends_the_job_of_fresh_interpreters(name, jobs):
    check_end(name, jobs(name, start_fresh))


def check_end(name, job):
    folder, (status,), (said,) = job
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
