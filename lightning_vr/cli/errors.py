"""Wrong settings as one line; bugs keep their traceback."""

import re
import traceback

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Problem with given class_path|Expected a path but|Not a valid subclass|Subclass types|"
    r"a class path|a dict with|$"
)


def cause(error: BaseException) -> BaseException:
    """Return what a constructor raised, where the parser has wrapped it."""
    while error.__cause__ is not None and _modules(error)[-1].startswith("jsonargparse"):
        if isinstance(error, ArgumentError):
            break
        error = error.__cause__
    return error


def is_wrong_setting(error: BaseException) -> bool:
    """Tell an error that its message tells enough of from a bug, whose traceback is wanted.

    Our own errors are written for users; others are about a setting unless training is under way.
    """
    if isinstance(error, (ArgumentError, MisconfigurationException)):
        return True
    modules = _modules(error)
    if modules[-1].startswith("lightning_vr."):
        return isinstance(error, (ValueError, OSError, ImportError))
    is_training = "lightning.pytorch.loops.training_epoch_loop" in modules
    return isinstance(error, ValueError) and not is_training


def one_line(error: BaseException) -> str:
    """Return the message in one line; of the parser's nested ones what a person needs.

    These are the keys that lead to the setting, what was expected of it and its value.
    """
    if not isinstance(error, ArgumentError):
        return " ".join(str(error).split())
    keys: list[str] = []
    reasons: list[str] = []
    for line in (line.strip().removeprefix("- ") for line in str(error).splitlines()):
        key = re.match(r'Parser key "([^"]+)":?\s*', line)
        if key and not reasons:
            keys.append(key[1])
            line = line[key.end() :]
        if not _NOISE.match(line) and not line.startswith("Parser key"):
            reasons.append(line)
    value = re.search(r"Given value: (\S{1,60})$", str(error), re.MULTILINE)
    if value and not any("Got value" in reason for reason in reasons):
        reasons.append(f"Got value: {value[1]}")
    text = ". ".join(reasons).replace("Expected a dot import path string", "No such class")
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.", "")
    return f"{'.'.join(keys)}: {text}" if keys else text


def _modules(error: BaseException) -> list[str]:
    """Return the modules from where the error was caught to where it was raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [str(frame.f_globals.get("__name__")) for frame in frames] or [""]
