"""An error of the parser in one line: the setting, what it must be, and the fix.

The parser raises errors without attributes. Their text nests the texts of all errors beneath, and
lists one for each type of a union. So what failed is read from that text: the keys and classes that
lead to the setting, then the first reason of ``_REASONS`` that it holds. For a new kind of error
add a pattern there, and the line to say or a function that makes it.
"""

import inspect
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_vr.cli.close_names import ANY_BASE, close_names, close_settings, subclass_names
from lightning_vr.lifecycle.configuration import imported

_LIST = "see --print_config for all settings"
_NEST = "name a class under `class_path` and its arguments under `init_args`"

_STEP = re.compile(r"Parser key \"(?P<key>[^\"]+)\"|given class_path '(?P<kind>[^']+)'")
_TYPE = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*)\]|([^<\n]+))")
_VALUE = re.compile(r" value: (?:NestedArg\(.*val=)?'?(.{1,60}?)'?\)?(?:\. Got .*)?$", re.MULTILINE)
_CALLED = re.compile(r" value: Namespace\(class_path='([^']+)'")


class _Failure(NamedTuple):
    """A setting that is wrong.

    Attributes:
        keys: The keys that lead to it.
        kind: The class that it names, or of which it is an argument, empty if the text lacks it.
        reason: What the pattern of the reason has captured.
        before: The text before the reason.
        after: The text from the reason on.
    """

    keys: list[str]
    kind: str
    reason: str
    before: str
    after: str

    @property
    def setting(self) -> str:
        return f"`{'.'.join(self.keys)}`"

    @property
    def value(self) -> str:
        found = _VALUE.search(self.after)
        if found is None:
            return "something else"
        return "nothing" if found[1] == "'" else found[1]

    def argument(self, name: str) -> str:
        """Return the full name of an argument of the setting."""
        return ".".join([*self.keys, name])


def parsing_error(text: str) -> str:
    """Return the text of an error of the parser in one line, with what to do instead."""
    if "<class 'torch.Tensor'>" in text:
        # a learning rate may be a tensor, which nobody writes
        text = re.sub(r"- (Expected a dot import path|Not a valid subclass of Tensor).*", "", text)
    for kind in re.findall(r"Problem with given class_path '([^']+)'", text):
        # of a union, that type counts which takes the class
        text = text.replace(f"Import path {kind} does not correspond to a subclass", "")
    for pattern, explain in _REASONS.items():
        if reason := re.search(pattern, text):
            failure = _read(text, reason)
            if isinstance(explain, str):
                line = explain.format(*reason.groups(), setting=failure.setting)
            else:
                line = explain(failure)
            return " ".join(line.replace("<unicode string>", "the file").split())
    end = re.search(r"\Z", text)
    assert end is not None
    failure = _read(text, end)
    if not failure.keys:
        return " ".join(text.split())
    detail = " ".join(re.findall(r"- (.*)", text)[-1:]) or "it does not parse"
    return f"{failure.setting} must be a valid setting, got another ({detail[:200]}): {_NEST}."


def _read(text: str, reason: re.Match[str]) -> _Failure:
    before, after = text[: reason.start()], text[reason.start() :]
    keys, kind = [], ""
    for step in _STEP.finditer(before):
        keys += [step["key"]] if step["key"] else []
        kind = step["kind"] or ""
    if before.endswith("callable class: ") and (called := _CALLED.search(after)):
        kind = called[1]
    return _Failure(keys, kind, reason[1] if reason.re.groups else "", before, after)


def _wrong_class(failure: _Failure) -> str:
    name = failure.reason or failure.value
    # a union lists its types; of another setting the text has no base class
    own = failure.before[max([0, *(step.end() for step in _STEP.finditer(failure.before))]) :]
    bases = re.findall(r"[\w.]+\.\w+", "".join(re.findall("Subtypes: (.*)", own)))
    names = subclass_names([imported(base) for base in bases] or ANY_BASE)
    near = [each for each in close_names(name, names) if each != name]
    if near or 0 < len(names) <= 12:
        fix = f"use {_either(near or names)}, or the full path of a class of your own"
    else:
        fix = "give the full path of one, as in package.module.Class"
    return f"{failure.setting} must be a class of the right kind, got {name}: {fix}."


def _no_attribute(failure: _Failure) -> str:
    module, name = failure.reason.split(" has no attribute ")
    near = [f"{module}.{each}" for each in close_names(name, dir(sys.modules.get(module)))]
    fix = f"use {_either(near)}" if near else "use another class"
    return f"{failure.setting} must be a class, got {module}.{name}, which does not exist: {fix}."


def _no_argument(failure: _Failure) -> str:
    kind = imported(failure.kind)
    if kind is None:
        return _no_setting(failure._replace(reason=failure.argument(failure.reason)))
    names = [x for x in inspect.signature(kind).parameters if x not in ("args", "kwargs")]
    if isinstance(kind, type) and issubclass(kind, (Optimizer, LRScheduler)):
        names = names[1:]  # the module gives the first: its weights, or their optimizer
    listed = _either(close_names(failure.reason, names) or names)
    fix = f"use {listed}" if len(listed) < 400 else _LIST
    if failure.reason == "class_path" or not names:
        fix = _NEST
    name = failure.argument(failure.reason)
    return f"`{name}` is not an argument of {kind.__name__}: {fix}."


def _no_setting(failure: _Failure) -> str:
    name = failure.reason.partition("=")[0]
    section, _, rest = name.removeprefix("--").partition(".")
    if section in ("fit", "validate", "test", "predict", "audit", "cache"):
        fix = f"give the file before the subcommand, or write {rest or 'its sections'} at the top"
        return f"`{section}` is the subcommand and no section of a file given after it: {fix}."
    near = close_settings(name.removeprefix("--"))
    fix = f"use {_either(near)}" if near else _NEST if name.count(".") > 1 else _LIST
    return f"`{name}` is not a setting: {fix}."


def _missing(failure: _Failure) -> str:
    kind = failure.kind.rpartition(".")[2] or "its class"
    names = [failure.argument(name) for name in failure.reason.split(", ")]
    return (
        f"{failure.setting} must have what {kind} requires ({failure.reason}): set "
        f"{' and '.join(names)}."
    )


def _wrong_type(failure: _Failure) -> str:
    found = _TYPE.findall(failure.after.partition(" value: ")[0])
    plain = [kind or words.partition(". Got")[0] for kind, _, words in found]
    plain = [each for each in dict.fromkeys(plain) if each not in ("", "NoneType")]
    choices = [choice for _, literal, _ in found if literal for choice in literal.split(", ")]
    near = close_names(failure.value, [choice.strip("'") for choice in choices])
    fix = f"use {near[0]}" if near else "use one of these"
    if not choices:
        fix = f"use {_either([_example(each) for each in plain])}"
    return f"{failure.setting} must be {_either([*plain, *choices])}, got {failure.value}: {fix}."


def _example(kind: str) -> str:
    count = re.fullmatch(r"tuple with (\d+) elements", kind)
    return f"a list of {count[1]} elements" if count else _EXAMPLES.get(kind, kind)


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), *names[-1:]]) if names[1:] else "".join(names)


_EXAMPLES = {
    "int": "a whole number",
    "float": "a decimal number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, as [1, 2]",
    "tuple": "a list, as [1, 2]",
    "Iterable": "a list, as [1, 2]",
    "Sequence": "a list, as [1, 2]",
}
_REASONS: dict[str, str | Callable[[_Failure], str]] = {
    r"module (\S+ has no attribute \w+)": _no_attribute,
    r"No module named '(.*)'": (
        "{setting} must be a class, got one of a module {0}, which cannot be imported: "
        "install it or correct the path."
    ),
    r"Expected a dot import path string: (.*)": _wrong_class,
    r"Option '(.*)' is not accepted": _no_argument,
    r"does not accept option '(.*)'": _no_setting,
    r"unrecognized arguments: (\S*)": _no_setting,
    r"the following arguments are required: ([\w, ]+)": _missing,
    r"argument (?:-\w/)?(\S+): expected one argument": (
        "`{0}` must have a value, got none: write {0}=VALUE."
    ),
    r"argument subcommand: invalid choice: (.*) \(choose from (.*)\)": (
        "The subcommand must be one of {1}, got {0}: use one of these."
    ),
    r"Not of type Positive\w+: (?:.*: )?(\S+) does not": (
        "{setting} must be positive, got {0}: use a number above 0."
    ),
    r"argument (?:-\w/)?(\S+): ignored explicit argument": (
        "`{0}` must have no value, got one: leave it out."
    ),
    r"Path is not a file: (.*)": ("{setting} must be a file, got {0}, which is none: name a file."),
    r"File does not exist: (.*)": (
        "{setting} must be a file, got {0}, which does not exist: correct the path."
    ),
    r"Key must be a string, got: (\S*?)\.?$": (
        "`config` must have names of settings as keys, got {0}: name one of --print_config."
    ),
    r"Unexpected config:(.*)": (
        "`config` must be a file of settings, got something else: begin a section, as `model:`."
    ),
    r"(?s)Problems parsing config: (.*)": (
        "`config` must be valid YAML, got a file that is not ({0}): fix the YAML there."
    ),
    r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: (.*)\.": (
        "{setting} must be one class, got {0}, the name of several: use one of {1}."
    ),
    r"argument of type 'NoneType' is not iterable": (
        "{setting} must name a class, got null: name one under `class_path`."
    ),
    r"'(\w+)' object has no attribute 'keys'": (
        "`init_args` of {setting} must be a section, got a {0}: write `name: value`."
    ),
    r"Import path (\S*?) ?does not correspond to a subclass": _wrong_class,
    r"Expected '(.*)' to be a (?:subclass of|function that returns)": _wrong_class,
    r"Unexpected import path format: (.*)": _wrong_class,
    r"Expected an instantiatable class, but (\S*?) ?is abstract": _wrong_class,
    r"Not a valid subclass of()": _wrong_class,
    r"Unable to load config '(.*)'": (
        "{setting} must be a section of settings, got {0}: give its settings one by one."
    ),
    r"Expected an? (?!path|<class 'NoneType'>)(.*)": _wrong_type,
}
"""Reasons, and what to say of them; of several in one text the first one here counts."""
