"""The command line as a process: exit statuses, and one line for a wrong setting."""

import atexit
import os
import signal
import sys
import traceback
from multiprocessing import parent_process
from typing import NoReturn

from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from lightning_vr.cli.errors import cause, exit_status, is_wrong_setting, one_line
from lightning_vr.cli.vr_cli import VRCLI
from lightning_vr.core.distributed import destroy_process_group, process_count, world_size
from lightning_vr.core.peers import announce_end, is_stop_announced, lost_rank
from lightning_vr.lifecycle.sharded_strategy import ShardedStrategy

_STOPPED = 128 + signal.SIGTERM


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The arguments, in place of those of the process.

    Raises:
        SystemExit: With status 2 and one line on stderr if a setting is wrong, with status 1 if
            another rank has ended or the disk is full. If the
            process is asked to stop, with status 143 where it is the main one of its node, with 0
            elsewhere.
    """
    _run(args)


def run() -> None:
    """Run the command line as all that a process does.

    Sharded weights keep process groups, and gloo's threads then abort the interpreter now and then
    while it ends (1 of 36 times): the process leaves before that.
    """
    is_sharded = _run(None)
    # who has forked this process waits for its result, and ends it without an interpreter's end
    if is_sharded and parent_process() is None:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run(args: ArgsType) -> bool:
    """Run the command line, and return whether weights were sharded over several processes."""
    try:
        trainer, count = VRCLI(args=args).trainer, process_count()
        destroy_process_group()
        return count > 1 and isinstance(trainer.strategy, ShardedStrategy)
    except BaseException as error:
        # an interrupt of one process alone is left to Python
        if isinstance(error, Exception | SIGTERMException) or process_count() > 1:
            _end(error, is_fit="fit" in (sys.argv[1:] if args is None else args))
        raise


def _end(error: BaseException, *, is_fit: bool) -> None:
    """Say what has ended the process, and end it; return if the error is to be raised again."""
    other, wrong = lost_rank(error), cause(error)
    announce_end(other)
    is_stop = isinstance(error, SIGTERMException)
    if is_stop or _is_stop_of_another(error) or (other is not None and is_stop_announced()):
        # Lightning would end with status 0, as if the job were done
        hint = ": `fit --ckpt_path last` goes on where one was saved" if is_fit else ""
        sys.stderr.write(f"stopped by SIGTERM{hint}\n")
        # where it started the others it would kill this one, still ending, if they ended with 143
        is_main = os.environ.get("LOCAL_RANK", "0") == "0"
        _leave(_STOPPED if is_main else 0, at_once=not is_stop or process_count() > world_size())
    if isinstance(error, SystemExit | KeyboardInterrupt):
        code = getattr(error, "code", None)
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
        # that a rank has ended alone is no success
        _leave(code if isinstance(code, int) and code else 1)
    if os.environ.get("LIGHTNING_VR_TRACEBACK"):
        _leave_with_traceback(error)
    elif other is not None:
        sys.stderr.write(f"error: {other} ended; see its message\n")
        _leave(1)
    elif isinstance(error, ProcessException) or not is_wrong_setting(wrong):
        _leave_with_traceback(error)
    else:
        sys.stderr.write(f"error: {one_line(wrong)}\n")
        _leave(exit_status(wrong))


def _is_stop_of_another(error: BaseException) -> bool:
    """Return whether a process that this one has forked was stopped."""
    return isinstance(error, ProcessExitedException) and error.exit_code == _STOPPED


def _leave_with_traceback(error: BaseException) -> None:
    """End this process if there are others; return if the error is to be raised again."""
    if process_count() > 1:
        traceback.print_exception(error)
        _leave(1)


def _leave(status: int, *, at_once: bool = True) -> NoReturn:
    """End this process, and at once if other ranks may wait for it.

    What gloo cleans up at exit may wait for ranks that wait for this one.
    """
    if process_count() > 1 and at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status) from None
