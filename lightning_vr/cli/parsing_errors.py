"""What the parser says in nested pages, as one line: the argument, what is wrong, the fix."""

import inspect
import re
import sys
from dataclasses import dataclass, field

from lightning_vr.cli.close_names import ANY_BASE, close_names, close_settings, subclass_names
from lightning_vr.lifecycle.configuration import imported

_FUNCTION = re.compile(
    r"Type typing\.[^\n]* expects a function or a callable class:"
    r"(.*?)\. Got value: Namespace\(class_path='([^']+)'[^\n]*",
    re.DOTALL,
)
_ASIDES = re.compile(
    r"Does not validate|Errors:|Given value|Expected a path but|Not a valid subclass|"
    r"Subclass types|a class path|a dict with|Parser key|Problem with given class_path|Subtypes:|"
    r"Expected a <class 'NoneType'>|$"
)


@dataclass
class _Findings:
    """What there is to say of one setting.

    Attributes:
        keys: The keys that lead to it, outermost first.
        owner: The class whose argument it is.
        subtypes: What its type is a union of, as the parser prints it.
        expected: Types that its value could have had.
        value: The value that it has.
        others: Whatever else is wrong.
    """

    keys: list[str] = field(default_factory=list)
    owner: str = ""
    subtypes: str = ""
    expected: list[str] = field(default_factory=list)
    value: str = ""
    others: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        is_open = not (self.expected or self.others)
        if is_open and (key := re.match(r'Parser key "([^"]+)":?\s*', line)):
            self.keys.append(key[1])
            self.owner, self.subtypes = "", ""
            line = line[key.end() :]
        if is_open and (owner := re.match(r"Problem with given class_path '([^']+)':\s*", line)):
            self.owner = owner[1]
            line = line[owner.end() :]
        if is_open and (subtypes := re.match(r"Subtypes: (.*)", line)):
            self.subtypes = subtypes[1]
        if value := re.search(
            r"(?:Given|Got) value: (?:NestedArg\(.*val=)?'?(.{1,60}?)'?\)?$", line
        ):
            self.value = self.value or value[1]
            line = line[: value.start()].rstrip(". ")
        if _ASIDES.match(line):
            return
        expected = re.match(r"Expected an? (<class '[^']+'>|(?:typing\.)?Literal\[.*\])", line)
        if expected:
            self.expected += _types(expected[1])
        else:
            self.others.append(line)

    @property
    def argument(self) -> str:
        return f"Argument `{'.'.join(self.keys)}`" if self.keys else "Argument"


def parsing_error(text: str) -> str:
    """Return a message of the parser in one line, and how to put it right."""
    found = _Findings()
    for line in _FUNCTION.sub(r"Problem with given class_path '\2':\n\1", text).splitlines():
        found.read(line.strip().removeprefix("- "))
    # a learning rate may be a tensor, which nobody writes
    if found.others and not ("torch.Tensor" in found.subtypes and found.expected):
        return " ".join(_explained(found).split())
    expected = list(dict.fromkeys(found.expected))
    near = close_names(found.value, [each.strip("'") for each in expected])
    fix = f": use {near[0]}" if near else ""
    return f"{found.argument} expected to be {_either(expected)}, but got {found.value}{fix}."


def _explained(found: _Findings) -> str:
    for pattern, explain in _EXPLANATIONS.items():
        if match := re.search(pattern, found.others[0]):
            return explain(match[1], found)
    reason = ", ".join(found.others)
    return f"{found.argument}: {reason}" if found.keys else reason


def _no_class(name: str, found: _Findings) -> str:
    bases = re.findall(r"[\w.]+\.\w+", found.subtypes)
    names = subclass_names([imported(base) for base in bases] or ANY_BASE)
    near = close_names(name, names)
    if near or 0 < len(names) <= 12:
        fix = f"use {_either(near or names)}, or the full path of a class of your own"
    else:
        fix = "give the full path of a class, as in package.module.Class"
    return f"{found.argument}: No such class here: {name}: {fix}."


def _no_attribute(words: str, found: _Findings) -> str:
    module, name = words.split(" has no attribute ")
    near = close_names(name, dir(sys.modules.get(module)))
    fix = f"use {_either([f'{module}.{each}' for each in near])}" if near else "use another class"
    return f"{found.argument}: No such class: {module}.{name}: {fix}."


def _no_option(name: str, found: _Findings) -> str:
    kind = imported(found.owner)
    if kind is None:
        return _no_setting(".".join([*found.keys, name]), found)
    names = [x for x in inspect.signature(kind).parameters if x not in ("args", "kwargs")]
    listed = _either(close_names(name, names) or names)
    fix = f"use {listed}" if len(listed) < 250 else _LIST
    if name == "class_path" or not names:
        fix = _NEST
    return f"{found.argument}: Option '{name}' is not accepted by {kind.__name__}: {fix}."


def _no_setting(name: str, found: _Findings) -> str:
    name = name.partition("=")[0]
    near = close_settings(name.removeprefix("--"))
    fix = f"use {_either(near)}" if near else _NEST if name.count(".") > 1 else _LIST
    return f"Argument `{name}` is unrecognized, as nothing takes it here: {fix}."


def _not_positive(words: str, found: _Findings) -> str:
    value = words.partition(" does not")[0].rpartition(": ")[2]
    return f"{found.argument} expected to be positive, but got {value}: use a number above 0."


def _missing(names: str, found: _Findings) -> str:
    kind = found.owner.rpartition(".")[2] or "it"
    full = [".".join([*found.keys, name]) for name in names.split(", ")]
    return (
        f"{found.argument}: the following arguments are required by {kind}: {names}: set "
        f"{' and '.join(full)}."
    )


def _no_settings(text: str, found: _Findings) -> str:
    return "Argument `config` expected to be a file of settings, such as `model:`, but got none."


def _no_yaml(text: str, found: _Findings) -> str:
    reason = ", ".join([text, *found.others[1:]]).replace("<unicode string>", "the file")
    return f"Argument `config`: Problems parsing config: {reason}: mend the YAML there."


_LIST = "see --print_config for what there is"
_NEST = "name a class under `class_path` and its arguments under `init_args`"
_EXPLANATIONS = {
    r"Expected a dot import path string: (.*)": _no_class,
    r"module (\S+ has no attribute \w+)": _no_attribute,
    r"Not of type Positive\w+: (.*)": _not_positive,
    r"Option '(.*)' is not accepted": _no_option,
    r"does not accept option '(.*)'": _no_setting,
    r"unrecognized arguments: (\S*)": _no_setting,
    r"the following arguments are required: (.*)": _missing,
    r"Unexpected config:(.*)": _no_settings,
    r"Problems parsing config: (.*)": _no_yaml,
}


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), *names[-1:]]) if names[1:] else "".join(names)


def _types(printed: str) -> list[str]:
    """Return the types that ``Expected a ...`` names, as a person would."""
    if literal := re.match(r"(?:typing\.)?Literal\[(.*)\]", printed):
        return literal[1].split(", ")
    return [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", printed)]
