"""A process that is asked to stop has a status that says so, and ends when it is done."""

import os
import subprocess
import sys

import pytest
from commands import NETWORK, POINTS, SHORT
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_vr.cli import entry_point, main

SLOW = """
import time
from pathlib import Path

from lightning.pytorch import Callback


class Slow(Callback):
    def on_train_batch_start(self, trainer, *args):
        trainer._signal_connector.received_sigterm = True  # as SIGTERM does

    def on_exception(self, trainer, *args):
        if trainer.is_global_zero:
            time.sleep(8)
            Path("uploaded").touch()
"""
"""Rank zero, as if it had much to upload, ends after Lightning has checked for failed ranks."""


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


def test_rank_zero_ends_in_its_own_time_where_lightning_started_the_others(folder):
    (folder / "slow.py").write_text(SLOW)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks=slow.Slow"]
    job = subprocess.run(
        [sys.executable, "-m", "lightning_vr", "fit", *NETWORK, *POINTS, *SHORT, *two],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert job.returncode == 143, job.stdout
    assert (folder / "uploaded").exists()
