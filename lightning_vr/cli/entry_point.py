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
from lightning_vr.core.distributed import destroy_process_group, world_size


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The arguments, in place of those of the process.

    Raises:
        SystemExit: With status 2 and one line on stderr if a setting is wrong, with status 1 if the
            last checkpoint of a run could not be written. If the process is
            asked to stop, with status 143 where it is the main one of its node, with 0 elsewhere.
    """
    try:
        VRCLI(args=args)
        destroy_process_group()
    except SIGTERMException:
        # Lightning would end with status 0, as if the job were done
        sys.stderr.write("stopped by SIGTERM: `fit --ckpt_path last` goes on where one was saved\n")
        # where it started the others it would kill this one, still ending, if they ended with 143
        is_main = os.environ.get("LOCAL_RANK", "0") == "0"
        raise SystemExit(128 + signal.SIGTERM if is_main else 0) from None
    except Exception as error:
        wrong = cause(error)
        if os.environ.get("LIGHTNING_VR_TRACEBACK") or not is_wrong_setting(wrong):
            if world_size() > 1:
                traceback.print_exc()
                _leave(1)
            raise
        sys.stderr.write(f"error: {one_line(wrong)}\n")
        status = getattr(wrong, "exit_status", 2)
        if world_size() > 1:
            _leave(status)
        raise SystemExit(status) from None


def _leave(status: int) -> NoReturn:
    """End at once: what gloo cleans up at exit may wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
