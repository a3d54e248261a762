"""Wrong settings as one line; bugs keep their traceback."""

import errno
import re
import sys
import traceback

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_vr.cli.parsing_errors import parsing_error
from lightning_vr.data.image_error import ImageError

_LIBRARIES = {"diffusers", "fsspec", "jsonargparse", "lightning", "lightning_utilities", "torch"}
_LIBRARIES |= {"lightning_vr", "torchmetrics", *sys.stdlib_module_names}

_USER_ERRORS = (ValueError, MisconfigurationException)
_EXPLANATIONS = {
    r"No supported gpu backend|Accelerator` can not run|torch_xla": (
        "`trainer.accelerator` must be one that this machine has: use auto."
    ),
    r"`Trainer\(devices='(.*)'\)`": (
        r"`trainer.devices` must be a number of 1 or more, or auto, on this accelerator, got \1: "
        r"use auto."
    ),
    r"`devices` selected with": (
        "`trainer.devices` must be a number of 1 or more, or auto, on this accelerator: use auto."
    ),
    r"invalid strategy name: `strategy='(.*?)'`": (
        r"`trainer.strategy` must be the name of a strategy, got \1: use auto, ddp or sharded."
    ),
    r".* not in bounds, numpy accepts": (
        "`seed_everything` must be between 0 and 4294967295: use 0."
    ),
    r"Found more than one stateful callback of type `ModelCheckpoint`": (
        "`trainer.callbacks` must have no two ModelCheckpoints with the same monitor, mode, "
        "every_n_train_steps, every_n_epochs and train_time_interval, by which a checkpoint tells "
        "them apart: change one of these, as `dirpath` and others do not count, or leave one out."
    ),
    r"Found more than one stateful callback of type (`\w+`)": (
        r"`trainer.callbacks` must differ, but \1 is there twice with equal settings: leave one of "
        r"them out."
    ),
    r"optimizer got an empty parameter list": (
        "`network` must have parameters that train, got none: use another, such as ResidualMLP."
    ),
    r"Invalid (learning rate|beta|epsilon|momentum|weight_decay)([^:]*): (.*)": (
        r"`model.optimizer` must have a valid \1\2, got \3: use a number of 0 or more, below 1 for "
        r"betas."
    ),
    r"(?i).*tried to allocate ([\d.]+ \w+).*": (
        r"\1 do not fit into the memory: use smaller sizes, such as `batch_size` or `resamples`."
    ),
    r"value cannot be converted to type float without overflow": (
        "`model.optimizer` must keep its numbers within float32, got one that is larger: lower "
        "`lr` or what `model.lr_scheduler` multiplies it by."
    ),
    r"embedded null byte": (
        "`save_dir`, `dirpath` and `path` must have no NUL byte, got one that has: correct it."
    ),
    r"^\[Errno \d+\] (.*): '(.*)'": (
        r"`trainer.logger.save_dir` or another path must be a folder that can be written, got \2 "
        r"(\1): name one that is."
    ),
}
"""Messages of other libraries that name no setting or no fix, and what to say instead."""

_WORKER_TRACEBACK = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback .*^[\w.]+: (.*)",
    re.DOTALL | re.MULTILINE,
)


_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_NO_MEMORY = re.compile(r"(?i)tried to allocate|out of memory|not enough memory")


def cause(error: BaseException) -> BaseException:
    """Return what a constructor raised, where the parser has wrapped it."""
    while error.__cause__ is not None and _is_of_parser(error):
        if isinstance(error, ArgumentError):
            break
        error = _cause_in_union(error) or error.__cause__
    return error


def _is_of_parser(error: BaseException) -> bool:
    return _modules(error)[-1].startswith("jsonargparse")


def _cause_in_union(error: BaseException) -> BaseException | None:
    """Return what a constructor raised of the types of a union, of which the parser names one.

    Seen in jsonargparse 4.53.0, in ``_typehints.raise_union_unexpected_value``.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    found = map(cause, frame.f_locals.get("exceptions", []))
    return next((each for each in found if not _is_of_parser(each)), None)


def is_wrong_setting(error: BaseException) -> bool:
    """Return whether the message of an error is enough; otherwise it is a bug, with a traceback.

    Our own errors are written for users. Others are about a setting unless training is under way or
    code of the user's own is at work, where only a ``ValueError`` is.
    """
    if isinstance(error, (ArgumentError, ImageError, MisconfigurationException)):
        return True
    modules = _modules(error)
    if _is_restoring(error) or _is_full_disk(error):
        return True
    if isinstance(error, (MemoryError, RuntimeError)) and _NO_MEMORY.search(str(error)):
        return True
    if modules[-1].startswith("torch.optim."):
        return isinstance(error, (AssertionError, RuntimeError, ValueError))
    if modules[-1].startswith("lightning_vr."):
        return isinstance(error, (ValueError, OSError, ImportError))
    if modules[-1].startswith("lightning.pytorch.callbacks."):
        return isinstance(error, (ValueError, RuntimeError))
    if isinstance(error, ValueError):
        return "lightning.pytorch.loops.training_epoch_loop" not in modules
    if isinstance(error, Warning):
        return False
    is_running = any(module.startswith("lightning.pytorch.loops") for module in modules)
    return not is_running and _is_of_libraries(modules)


def one_line(error: BaseException) -> str:
    """Return the message in one line: what is wrong, and what to do instead."""
    if isinstance(error, ArgumentError):
        return parsing_error(str(error))
    if isinstance(error, UnicodeDecodeError):
        return _not_text(error)
    if _is_full_disk(error):
        return (
            f"The disk must have room for what the command writes, but is full ({error}): free "
            f"some, or write elsewhere by `trainer.logger.save_dir` or `trainer.default_root_dir`."
        )
    text = " ".join(_own_text(error).split()) or type(error).__name__
    is_ours = _modules(error)[-1].startswith("lightning_vr.")
    for pattern, explanation in _EXPLANATIONS.items():
        if found := re.search(pattern, text):
            text, is_ours = found.expand(explanation), True
            break
    if _is_restoring(error) and not (is_ours and isinstance(error, _USER_ERRORS)):
        return (
            f"`ckpt_path` must be a checkpoint that this run can go on from, got one that does not "
            f"restore ({type(error).__name__}: {text.rstrip('.')}): use another checkpoint."
        )
    if not is_ours and _modules(error)[-1].startswith("torch.optim."):
        text = f"`model.optimizer` must fit the network and the device, got: {text.rstrip('.')}: "
        text += "change its settings, or use another, such as AdamW."
    built = _class_being_built(error)
    if built is None or built in text or text.startswith("`trainer."):
        return text
    has_fix = is_ours or "HINT" in text or ": use " in text
    return f"{built}: {text}" if has_fix else f"{built}: {text.rstrip('.')}: change its settings."


def exit_status(error: BaseException) -> int:
    """Return the status of a command that ends with one line: 2 where a setting is wrong."""
    status: int = getattr(error, "exit_status", 1 if _is_full_disk(error) else 2)
    return status


def _is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL_DISK


def _not_text(error: UnicodeDecodeError) -> str:
    """Return what to do about a file that is not UTF-8, with its name where a frame knows it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    paths = [frame.f_locals.get("self") for frame in frames]
    name = next((f"{path}" for path in paths if type(path).__name__.startswith("Path")), "one")
    return (
        f"`config` must be a file of UTF-8 text, got {name}, which is not ({error.reason}): name "
        f"another, or save it as UTF-8."
    )


def _own_text(error: BaseException) -> str:
    """Return the message without the traceback of a loader's worker, which torch puts before it."""
    text = str(error)
    found = _WORKER_TRACEBACK.match(text)
    return found[1] if found else text


def _class_being_built(error: BaseException) -> str | None:
    """Return the class whose constructor has raised, by the name that settings call it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    builders = [frame for frame in frames if frame.f_code.co_name in ("__init__", "__post_init__")]
    for kind in (type(frame.f_locals.get("self")) for frame in builders):
        if kind.__name__.startswith("_") or kind.__module__.startswith("jsonargparse"):
            continue
        is_setting = _modules(error)[0].startswith("jsonargparse")
        if is_setting or issubclass(kind, (Optimizer, LRScheduler)):
            return kind.__name__
    return None


def _is_restoring(error: BaseException) -> bool:
    """Return whether an error was raised while Lightning restored a checkpoint."""
    names = [
        frame.f_code.co_name
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).endswith(".checkpoint_connector")
    ]
    return any(name.startswith(("restore", "resume_start")) for name in names)


def _is_of_libraries(modules: list[str]) -> bool:
    return all(module.partition(".")[0] in _LIBRARIES for module in modules)


def _modules(error: BaseException) -> list[str]:
    """Return the modules from where the error was caught to where it was raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [str(frame.f_globals.get("__name__")) for frame in frames] or [""]
