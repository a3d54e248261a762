"""Functions run in a forked process."""

import os
import runpy
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing import get_context

import torch
from lightning.fabric.strategies.launchers import subprocess_script as lightning_launcher

from lightning_vr import __main__


def exit_code(function, seconds):
    """Run a function in a fork of this process; return its exit code, or None if it hangs."""

    def child():
        torch.set_num_threads(1)  # OpenMP hangs in a fork of a process that has used its threads
        function()

    process = get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    code = process.exitcode
    process.kill()  # this process would wait for it at its own end
    return code


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


def let_lightning_fork():
    """Let Lightning start the other ranks as forks, and look every second whether one has ended.

    They do what its command says, which is that of this process, had it been a fresh interpreter.
    """
    sys.modules["__main__"].__spec__ = __main__.__spec__

    def start(command, env, cwd):
        executable, flag, module, *arguments = command
        assert (executable, flag) == (sys.executable, "-m")

        def run():
            set_environment(env)
            sys.argv = [module, *arguments]
            del sys.modules[module]  # Python warns of what it is to run and has imported
            runpy.run_module(module, run_name="__main__")

        return Fork(run)

    lightning_launcher.subprocess.Popen = start
    lightning_launcher._ChildProcessObserver.__init__.__defaults__ = (1,)


def set_environment(variables):
    """Replace the environment of this process."""
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
