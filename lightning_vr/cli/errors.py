"""Wrong settings as one line; bugs keep their traceback."""

import re
import sys
import traceback

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_vr.cli.parsing_errors import parsing_error

_LIBRARIES = {"diffusers", "fsspec", "jsonargparse", "lightning", "lightning_utilities", "torch"}
_LIBRARIES |= {"lightning_vr", "torchmetrics", *sys.stdlib_module_names}

_NO_DEVICE = "Argument `trainer.accelerator` asks for a device that this machine lacks: use auto."
_TRANSLATIONS = {
    r"No supported gpu backend|Accelerator` can not run|torch_xla": _NO_DEVICE,
    r"`Trainer\(devices='(.*)'\)`": (
        r"Argument `trainer.devices` expected to be a number of 1 or more, or auto, on this "
        r"accelerator, but got \1: use auto."
    ),
    r"`devices` selected with": (
        "Argument `trainer.devices` expected to be a number of 1 or more, or auto, on this "
        "accelerator: use auto."
    ),
    r".* not in bounds, numpy accepts": (
        "Argument `seed_everything` expected to be between 0 and 4294967295: use 0."
    ),
    r"Found more than one stateful callback of type (`\w+`)": (
        r"Argument `trainer.callbacks` has \1 twice with equal settings: leave one of them out."
    ),
    r"optimizer got an empty parameter list": (
        "Argument `network` has no parameters that train: use another, such as ResidualMLP."
    ),
    r"Invalid (learning rate|beta|epsilon|momentum|weight_decay)([^:]*): (.*)": (
        r"Argument `model.optimizer` got an invalid \1\2, \3: use a number of 0 or more, below 1 "
        r"for betas."
    ),
    r".*tried to allocate (\d+ bytes).*": r"\1 do not fit into the memory: use smaller sizes.",
    r"(\S+) is no checkpoint that loads safely: ([^.:]*).*": (
        r"Argument `ckpt_path`: \1 is no checkpoint that loads safely (\2): name a whole file that "
        r"a ModelCheckpoint wrote."
    ),
    r"\[Errno \d+\] (.*): '(.*)'": (
        r"Argument `trainer.logger.save_dir` or another path expected to be a folder that can be "
        r"written, but got \2 (\1): name one that is."
    ),
}
"""What others say of a setting without naming it, or what to do about it."""


def cause(error: BaseException) -> BaseException:
    """Return what a constructor raised, where the parser has wrapped it."""
    while error.__cause__ is not None and _modules(error)[-1].startswith("jsonargparse"):
        if isinstance(error, ArgumentError):
            break
        error = error.__cause__
    return error


def is_wrong_setting(error: BaseException) -> bool:
    """Tell an error that its message tells enough of from a bug, whose traceback is wanted.

    Our own errors are written for users. Others are about a setting unless training is under way or
    code of the user's own is at work, where only a ``ValueError`` is.
    """
    if isinstance(error, (ArgumentError, MisconfigurationException)):
        return True
    modules = _modules(error)
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
    text = " ".join(str(error).split()) or type(error).__name__
    for pattern, translation in _TRANSLATIONS.items():
        if found := re.search(pattern, text):
            text = found.expand(translation)
            break
    built = _class_being_built(error)
    if built is None or built in text or text.startswith("Argument `trainer."):
        return text
    is_told = text.startswith("Argument") or "HINT" in text or ": use " in text
    return f"{built}: {text}" if is_told else f"{built}: {text.rstrip('.')}: mend its settings."


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


def _is_of_libraries(modules: list[str]) -> bool:
    return all(module.partition(".")[0] in _LIBRARIES for module in modules)


def _modules(error: BaseException) -> list[str]:
    """Return the modules from where the error was caught to where it was raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [str(frame.f_globals.get("__name__")) for frame in frames] or [""]
