"""Runs that are stopped, and what two runs left behind, compared bit by bit."""

import csv
import math
import os
import signal

import torch
from lightning.pytorch import Callback


class StoppedError(Exception):
    pass


class StopAt(Callback):
    """Saves a checkpoint at the n-th call of a hook, and raises."""

    def __init__(self, hook, count, path):
        self.count, self.path = count, path
        setattr(self, hook, self.stop)

    def stop(self, trainer, *args):
        self.count -= not trainer.sanity_checking
        if self.count == 0:
            trainer.save_checkpoint(self.path)
            raise StoppedError


class DieAt(StopAt):
    """Saves a checkpoint at the n-th call of a hook, whereupon the process is no more."""

    def stop(self, *args):
        try:
            super().stop(*args)
        except StoppedError:
            os._exit(9)


class Terminate(Callback):
    """Asks the process of one rank alone to stop, at the n-th call of a hook."""

    def __init__(self, hook, count, rank=0):
        self.count, self.rank = count, rank
        setattr(self, hook, self.ask)

    def ask(self, trainer, *args):
        self.count -= not trainer.sanity_checking
        if self.count == 0 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def logs(folder):
    """Rows of all versions: {(step, name): values}."""
    found = {}
    for path in sorted(folder.glob("version_*/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault((row["step"], name), set()).add(value)
    return found


def assert_equal(found, expected, where=""):
    """Nested states, bit by bit."""
    if isinstance(expected, torch.Tensor):
        same = torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))
        assert same, where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found), where
    else:
        assert found == expected, where
