"""Jobs of several processes, each as a fresh interpreter or as a fork of this one.

A fork has the environment, the folder and the arguments of its process, but no imports to wait for.
"""

import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from contextlib import suppress

import torch
from lightning.fabric.strategies.launchers import subprocess_script as lightning_launcher
from torch.distributed import run as torch_launcher

from lightning_vr import __main__
from lightning_vr.cli import main

SECONDS = 120
"""Seconds after which a job counts as hanging."""

_FOREIGN = ("SLURM", "PL_", "MASTER_", "PYTEST")


def environment(given):
    """Return the variables of a process: this one's without those of a job, and some of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **given}


def start_fresh(folder, arguments, torchrun=(), **given):
    """Start the command line in a folder, in an interpreter of its own."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "lightning_vr", *arguments],
        cwd=folder,
        env=environment(given | {"PYTHONPATH": path}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


class Fork:
    """A function in a fork of this process, with what ``subprocess.Popen`` says of a process."""

    def __init__(self, function):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_leave(function)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", seconds)
            time.sleep(0.02)


def start_fork(folder, arguments, torchrun=(), fork_others=True, **given):
    """Start the command line in a folder, in a fork of this process.

    Ranks that Lightning starts from there are forks too, or else fresh interpreters.
    """
    log = folder / f"{uuid.uuid4()}.txt"

    def run():
        os.setsid()
        os.chdir(folder)
        _set_environment(environment(given))
        sys.path.insert(0, str(folder))
        sys.argv = ["lightning_vr", *arguments]
        _write_to(log)
        torch.set_num_threads(1)  # OpenMP hangs in a fork of a process that has used its threads
        if torchrun:
            fork = ["--start-method=fork", "--run-path", __main__.__file__]
            torch_launcher.main([*torchrun, *fork, *arguments])
        else:
            if fork_others:
                _let_lightning_fork()
            else:  # by the command that has started this process, had it been one
                sys.modules["__main__"].__spec__ = __main__.__spec__
            main()

    process = Fork(run)
    process.log = log
    return process


def finish(processes):
    """Wait for processes; return their statuses and what they have said."""
    end = time.monotonic() + SECONDS
    said = []
    try:
        for each in processes:
            left = max(1, end - time.monotonic())
            if isinstance(each, Fork):
                each.wait(left)
                said.append(each.log.read_text())
            else:
                said.append(each.communicate(timeout=left)[0])
    finally:
        for process in processes:
            _end_group(process)
    return [process.returncode for process in processes], said


def _let_lightning_fork():
    """Let Lightning start the other ranks as forks, and look every second whether one has ended."""

    def start(command, env, cwd):
        def run():
            _set_environment(env)
            main()

        return Fork(run)

    lightning_launcher.subprocess.Popen = start
    lightning_launcher._ChildProcessObserver.__init__.__defaults__ = (1,)


def _set_environment(variables):
    os.environ.clear()
    os.environ.update(variables)


def _run_and_leave(function):
    """Run a function and end this process as Python would."""
    status = 1
    try:
        function()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _write_to(log):
    """Write to a file what this process prints, logs and leaves to the system to print."""
    file = log.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = [logging.StreamHandler(file)]


def _end_group(process):
    """Torchrun has sessions of its own for its processes, and ends them if it is asked to end."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
