"""A job that is killed again and again, and resumed, ends as the job that was not killed."""

import copy
import os
import random
import signal
import sys
import threading

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from support.comparisons import assert_equal, logs
from support.forks import exit_code

from lightning_vr.cli import main

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]

CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "DiffusionModule",
        "init_args": {
            "network": {"class_path": "ResidualMLP", "init_args": {"width": 8, "depth": 1}},
            "target": {"class_path": "STF", "init_args": {"references": 16}},
            "draws": {
                "class_path": "CARV",
                "init_args": {"resamples": 2, "proposal": "LearnedProposal"},
            },
        },
    },
    "data": {
        "class_path": "EightGaussians",
        "init_args": {"batch_size": 16, "num_samples": 119, "num_validation": 16},
    },
    "trainer": {
        "accelerator": "cpu",
        "accumulate_grad_batches": 2,
        "check_val_every_n_epoch": None,
        "val_check_interval": 9,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "EMA", "init_args": {"decay": 0.9}},
            {"class_path": "TargetVariance", "init_args": {"samples": 64, "noise_levels": 3}},
            {
                "class_path": "GradientVariance",
                "init_args": {"every_n_steps": 5, "noise_levels": 2},
            },
            {"class_path": "FrechetDistance", "init_args": {"samples": 20}},
            {
                "class_path": "ModelCheckpoint",
                "init_args": {
                    "save_last": True,
                    "every_n_train_steps": 3,
                    "save_on_exception": True,
                },
            },
        ],
    },
}


class Kill(Callback):
    """Sends this process a signal after some batches, at a random place in the next one."""

    def __init__(self, batches: int, number: int, seconds: float):
        self.batches, self.number, self.seconds = batches, number, seconds

    def on_train_batch_start(self, *args):
        self.batches -= 1
        if self.batches == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), self.number)).start()


def train(folder, steps, kill=None, resume=False):
    """Run the command line in a process of its own, forked; return its exit code."""

    def child():
        os.chdir(folder)
        sys.stdout = sys.stderr = (folder / "log.txt").open("a", buffering=1)
        main(["fit", "--config=config.yaml", *(["--ckpt_path=last"] if resume else [])])

    config = copy.deepcopy(CONFIG)
    config["trainer"]["max_steps"] = steps
    if kill is not None:
        killer = {"class_path": f"{__name__}.Kill", "init_args": kill}
        config["trainer"]["callbacks"].append(killer)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    code = exit_code(child, seconds=120)
    assert code is not None, (folder / "log.txt").read_text()[-3000:]
    return code


def checkpoints(folder):
    return sorted(folder.glob("runs/*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)


def end(folder):
    return torch.load(checkpoints(folder)[-1], weights_only=True)


def test_a_job_that_is_killed_six_times_ends_as_one_that_was_not(tmp_path):
    check_kills(tmp_path, kills=6, steps=20)


@pytest.mark.slow
def test_a_job_that_is_killed_twenty_times_ends_as_one_that_was_not(tmp_path):
    check_kills(tmp_path, kills=20, steps=100)


def check_kills(tmp_path, kills, steps):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert train(whole, steps) == 0

    source = random.Random(0)
    numbers = [signal.SIGTERM, signal.SIGKILL] * (kills // 2)
    for number in source.sample(numbers, kills):
        kill = {"batches": source.randint(1, 9), "number": int(number)}
        kill["seconds"] = source.uniform(0, 0.02)
        code = train(killed, steps, kill, resume=bool(checkpoints(killed)))
        # a signal that asks to stop ends in an exit with a status
        assert code in (-number, 143), (code, (killed / "log.txt").read_text()[-3000:])
        for path in killed.glob("runs/*/checkpoints/*.ckpt"):
            torch.load(path, weights_only=True)  # whole
    assert train(killed, steps, resume=True) == 0
    first, second = logs(whole / "runs"), logs(killed / "runs")
    assert first == second
    for part in ("state_dict", "optimizer_states", "lightning_vr"):
        assert_equal(end(killed)[part], end(whole)[part], part)
