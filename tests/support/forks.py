"""Functions run in a forked process."""

from multiprocessing import get_context

import torch


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
