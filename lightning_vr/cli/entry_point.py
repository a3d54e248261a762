"""The command line as a process: exit statuses, and one line for a wrong setting."""

import os
import signal
import sys
import traceback
from typing import NoReturn

from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_vr.cli.errors import cause, is_wrong_setting, one_line
from lightning_vr.cli.vr_cli import VRCLI
from lightning_vr.core.distributed import destroy_process_group, process_count, world_size
from lightning_vr.core.peers import announce_end, is_stop_announced, lost_rank


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The arguments, in place of those of the process.

    Raises:
        SystemExit: With status 2 and one line on stderr if a setting is wrong, with status 1 if
            another rank has ended. If the process is asked to stop, with status 143 where it is the
            main one of its node, with 0 elsewhere.
    """
    try:
        VRCLI(args=args)
        destroy_process_group()
    except BaseException as error:
        # an interrupt of one process alone is left to Python
        if isinstance(error, Exception | SIGTERMException) or process_count() > 1:
            _end(error)
        raise


def _end(error: BaseException) -> None:
    """Say what has ended the process, and end it; return if the error is to be raised again."""
    other, wrong = lost_rank(error), cause(error)
    has_traceback = bool(os.environ.get("LIGHTNING_VR_TRACEBACK"))
    is_stop = isinstance(error, SIGTERMException)
    if is_stop or (other is not None and is_stop_announced()):
        # Lightning would end with status 0, as if the job were done
        sys.stderr.write("stopped by SIGTERM: `fit --ckpt_path last` goes on where one was saved\n")
        # where it started the others it would kill this one, still ending, if they ended with 143
        is_main = os.environ.get("LOCAL_RANK", "0") == "0"
        status = 128 + signal.SIGTERM if is_main else 0
    elif isinstance(error, SystemExit | KeyboardInterrupt):
        code = getattr(error, "code", None)
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
        # that a rank has ended alone is no success
        status = code if isinstance(code, int) and code else 1
    elif other is not None and not has_traceback:
        sys.stderr.write(f"error: {other} ended; see its message\n")
        status = 1
    elif is_wrong_setting(wrong) and not has_traceback:
        sys.stderr.write(f"error: {one_line(wrong)}\n")
        status = 2
    elif process_count() > 1:
        traceback.print_exception(error)
        status = 1
    else:
        return
    _leave(status, is_stopped_together=is_stop and world_size() > 1)


def _leave(status: int, *, is_stopped_together: bool) -> NoReturn:
    """End this process, and at once if it ends without the other ranks.

    What gloo cleans up at exit may wait for ranks that wait for this one.
    """
    if process_count() == 1 or is_stopped_together:
        raise SystemExit(status) from None
    announce_end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
