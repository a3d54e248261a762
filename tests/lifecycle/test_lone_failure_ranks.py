"""One of two ranks ends alone: what can be saved is saved, and the other ends, too, and says why.

Nothing hangs: a test that did would run into the time limit of its process group, whose error is
another one.
"""

import os
import signal
import socket
import sys
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from support.networks import small_mlp
from support.selections import mostly_slow
from support.trainers import quiet_trainer
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException

from lightning_vr import STF, DiffusionModule, TargetVariance
from lightning_vr.core import peers
from lightning_vr.core.distributed import rank
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle import lone_failure

pytestmark = [
    pytest.mark.usefixtures("no_pictures_in_module"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

LIMIT = timedelta(seconds=60)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise OSError("the disk is gone")


ENDS = {
    "exit": lambda: sys.exit(3),
    "exit as if all were well": lambda: sys.exit(0),
    "interrupt": interrupt,
    "error": fail,
    "stop": stop,
}


class End(Callback):
    """Ends one rank at the n-th call of a hook."""

    def __init__(self, how, number, hook="on_train_batch_start", count=3):
        self.how, self.number, self.count = how, number, count
        setattr(self, hook, self.end)

    def end(self, trainer, *args):
        self.count -= not trainer.sanity_checking
        if self.count == 0 and trainer.global_rank == self.number:
            ENDS[self.how]()


def fit(folder, *callbacks, start):
    trainer = quiet_trainer(
        TargetVariance([4], noise_levels=3, samples=64),
        *callbacks,
        ModelCheckpoint(folder, save_last=True, save_on_exception=True, every_n_epochs=100),
        strategy=DDPStrategy(start_method=start, timeout=LIMIT),
        devices=2,
        max_epochs=2,
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    data = EightGaussians(4, num_samples=43, num_validation=8)
    trainer.fit(DiffusionModule(small_mlp(), target=STF(16)), data)


def ended_rank(number, folder, port, end):
    """A process as a launcher starts it, which writes what it has ended by."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": number, "NODE_RANK": 0}
    os.environ |= {name: str(value) for name, value in place.items()}
    lone_failure._SECONDS_TO_HEAR = 0.2
    try:
        fit(folder, end, start="popen")
    except BaseException as error:
        found = {
            "error": type(error).__name__,
            "notes": getattr(error, "__notes__", []),
            "lost": peers.lost_rank(error),
        }
        torch.save(found, folder / f"{rank()}.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What two ranks have ended by of which one ends alone, and the steps of the checkpoint."""

    def run(*arguments):
        folder = tmp_path_factory.mktemp("ended")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = (folder, port, End(*arguments))
        multiprocessing.start_processes(ended_rank, given, nprocs=2, start_method="fork")
        ranks = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]
        return ranks, torch.load(folder / "last.ckpt", weights_only=True)["global_step"]

    return run


KINDS = {"exit": "SystemExit", "interrupt": "SystemExit", "error": "OSError"}
LONE = [(how, number) for how in KINDS for number in (0, 1)]


@pytest.mark.parametrize(
    ("how", "number"),
    mostly_slow(LONE, [("exit", 0), ("interrupt", 1), ("error", 0), ("error", 1)]),
)
def test_a_rank_that_ends_alone_ends_both_and_the_first_saves(how, number, ended):
    """Lightning turns an interrupt into an exit."""
    ranks, steps = ended(how, number)
    assert ranks[number] == {"error": KINDS[how], "notes": [], "lost": None}
    other = ranks[1 - number]
    assert other["lost"] == f"rank {number}"
    assert f"rank {number} ended; see its message" in other["notes"]
    assert steps == 2


@pytest.mark.parametrize("number", mostly_slow([0, 1], [1]))
def test_a_rank_that_ends_after_a_validation_batch_ends_both(number, ended):
    """The checkpoint holds metrics, which synchronize themselves when they are read."""
    ranks, steps = ended("exit", number, "on_validation_batch_end", 1)
    assert ranks[number]["lost"] is None
    assert ranks[1 - number]["lost"] == f"rank {number}"
    assert steps == 5


def test_who_has_forked_the_ranks_hears_of_an_exit_as_if_all_were_well(tmp_path):
    with pytest.raises(Exception, match=r"Connection (closed|reset) by peer"):
        fit(tmp_path, End("exit as if all were well", 1), start="fork")


def test_who_has_forked_the_ranks_hears_that_they_were_stopped(tmp_path):
    with pytest.raises(ProcessExitedException) as error:
        fit(tmp_path, End("stop", 1), start="fork")
    assert error.value.exit_code == 143
