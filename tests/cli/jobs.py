"""Jobs of several processes, each as a fresh interpreter or as a fork of this one.

A fork has the environment, the folder and the arguments of its process, but no imports to wait for.
"""

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress

import torch
from support.forks import Fork, let_lightning_fork, set_environment
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


def start_fork(folder, arguments, torchrun=(), **given):
    """Start the command line in a folder, in a fork of this process, as are Lightning's ranks."""
    log = folder / f"{uuid.uuid4()}.txt"

    def run():
        os.setsid()
        os.chdir(folder)
        set_environment(environment(given))
        sys.path.insert(0, str(folder))
        sys.argv = ["lightning_vr", *arguments]
        _write_to(log)
        torch.set_num_threads(1)  # OpenMP hangs in a fork of a process that has used its threads
        if torchrun:
            fork = ["--start-method=fork", "--run-path", __main__.__file__]
            torch_launcher.main([*torchrun, *fork, *arguments])
        else:
            let_lightning_fork()
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
