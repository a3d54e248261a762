"""Callbacks that stop a run at a chosen place."""

import os
import signal

from lightning.pytorch import Callback


class StoppedError(Exception):
    """What a stopped run raises."""


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
    """Saves a checkpoint at the n-th call of a hook, and ends the process there."""

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
