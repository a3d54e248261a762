"""A process that is asked to stop has a status that says so, and ends when it is done."""

import os
import signal
from functools import wraps

import pytest
from commands import NETWORK, POINTS, SHORT, run_in
from jobs import finish, start_fork, start_fresh
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import HashStore

from lightning_vr import DiffusionModule
from lightning_vr.cli import entry_point, main
from lightning_vr.core import peers

SLOW = """
import os
import time
from pathlib import Path

from lightning.pytorch import Callback


class Slow(Callback):
    def on_train_batch_start(self, trainer, *args):
        trainer._signal_connector.received_sigterm = True  # as SIGTERM does

    def on_exception(self, trainer, *args):
        if trainer.is_global_zero:
            time.sleep(float(os.environ["SECONDS_TO_UPLOAD"]))
            Path("uploaded").touch()
"""
"""Rank zero, as if it had much to upload, ends after Lightning has checked for failed ranks.

It checks fresh interpreters every 5 s, and forks here every second.
"""


@pytest.mark.parametrize(
    ("local_rank", "status"),
    [(None, 143), ("0", 143), ("1", 0)],
    ids=["only one", "main one of a node", "started by it"],
)
def test_the_status_of_a_stopped_process_is_143_unless_lightning_started_it(
    local_rank, status, monkeypatch, capsys
):
    def stop(**kwargs):
        raise SIGTERMException

    monkeypatch.setattr(entry_point, "VRCLI", stop)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)

    with pytest.raises(SystemExit) as exit_:
        main([])

    assert exit_.value.code == status
    assert "stopped by SIGTERM" in capsys.readouterr().err


class LeftError(Exception):
    """What ends a rank at once, in place of the end of the tests' process."""


LOST = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4711. GLHF!")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (LOST, 1, "error: rank 1 ended; see its message"),
        (ValueError("`x` must be 1"), 2, "error: `x` must be 1"),
        (SystemExit(3), 3, ""),
        (SystemExit(0), 1, ""),
        (SystemExit("no data"), 1, "no data"),
        (KeyboardInterrupt(), 1, ""),
    ],
    ids=["another is gone", "wrong setting", "exit", "exit as if done", "exit, why", "interrupt"],
)
def test_one_of_two_ranks_that_ends_says_why_and_has_a_status(
    error, status, message, monkeypatch, capsys
):
    def fail(**kwargs):
        raise error

    def leave(status):
        raise LeftError(status)

    monkeypatch.setattr(entry_point, "VRCLI", fail)
    monkeypatch.setattr(os, "_exit", leave)
    for module in (entry_point, peers):
        monkeypatch.setattr(module, "process_count", lambda: 2)
    monkeypatch.setattr(peers, "_get_default_store", HashStore)

    with pytest.raises(LeftError) as left:
        main([])

    assert left.value.args == (status,)
    assert capsys.readouterr().err.strip() == message


def test_rank_zero_ends_in_its_own_time_where_lightning_started_the_others(folder):
    check_own_time(start_fork, folder, seconds=3)


@pytest.mark.slow
def test_rank_zero_of_fresh_interpreters_ends_in_its_own_time(folder):
    check_own_time(start_fresh, folder, seconds=8)


def check_own_time(start, folder, seconds):
    (folder / "slow.py").write_text(SLOW)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks=slow.Slow"]
    arguments = ["fit", *NETWORK, *POINTS, *SHORT, *two]
    (status,), (said,) = finish([start(folder, arguments, SECONDS_TO_UPLOAD=str(seconds))])
    assert status == 143, said
    assert (folder / "uploaded").exists()


def asking(whole, count, calls):
    """A method that asks this process to stop when it is called for the n-th time."""

    @wraps(whole)
    def call(*args, **kwargs):
        calls.append(whole.__name__)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    return call


@pytest.fixture
def ask(monkeypatch):
    """Ask to stop at the n-th call of a method; return the calls, to be."""

    def at(method, count):
        calls = []
        whole = getattr(DiffusionModule, method)
        monkeypatch.setattr(DiffusionModule, method, asking(whole, count, calls))
        return calls

    return at


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return ["--ckpt_path", str(folder / run_in(folder, "fit") / "checkpoints/last.ckpt")]


@pytest.mark.parametrize(
    ("command", "method", "count", "flags"),
    [
        ("predict", "denoise", 3, ["--model.sampler.steps=9"]),
        ("predict", "predict_step", 2, ["--batch_size=10", "--model.sampler.steps=2"]),
        ("validate", "validation_step", 1, ["--trainer.limit_val_batches=2"]),
        ("validate", "validation_step", 2, ["--trainer.limit_val_batches=2"]),
        ("test", "test_step", 1, []),
        ("audit", "clean", 2, ["--budget=1000"]),
    ],
)
def test_what_trains_nothing_stops_at_the_next_batch_or_step(
    command, method, count, flags, run, checkpoint, folder, ask, capsys
):
    calls = ask(method, count)
    few = ["--data.batch_size=16"] if command != "predict" else []
    with pytest.raises(SystemExit) as exit_:
        run(command, *checkpoint, *flags, *few)
    assert exit_.value.code == 143
    assert len(calls) == count
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM"
    written = {path.name for path in folder.glob("runs/*/*")}
    assert not written & {"samples.npz", "samples.png", "audit.json"}


def test_a_run_stops_while_it_encodes_references(run, ask):
    calls = ask("encode", 2)
    references = ["--model.target=STF", "--model.target.references=8", "--data.batch_size=16"]
    with pytest.raises(SystemExit) as exit_:
        run("fit", *references, "--trainer.num_sanity_val_steps=0")
    assert exit_.value.code == 143
    assert len(calls) == 2
