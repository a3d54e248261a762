"""A constructor's arguments from a checkpoint, checked before the parser sees them.

The parser imports each class path that it reads, also out of text, and out of files that text
names; a ``class_path`` in a dictionary may name any function, which it calls. So what it is given
holds only names that ``Trust`` has passed, each of the kind that the argument's type hint takes,
and text out of which nothing else can be read.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any

import yaml
from torch import Tensor

from lightning_vr.lifecycle.lookup import could_be_imported
from lightning_vr.lifecycle.trust import Trust
from lightning_vr.lifecycle.wanted_types import OPEN, Wanted, parameter_types

_SPECIFICATION = {"class_path", "init_args", "dict_kwargs"}
_MOST_VALUES, _MOST_LEVELS, _LONGEST_TEXT = 100_000, 30, 100_000


def checked_arguments(trust: Trust, kind: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of ``kind`` that are safe to give to the parser.

    Args:
        trust: What may be built.
        kind: A class or function.
        arguments: Its arguments by name, as configurations.

    Raises:
        ValueError: With the argument, and what is refused.
    """
    return _Walk(trust).arguments(kind, arguments, "", 0)


class _Walk:
    """One walk over the arguments in a checkpoint."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self.count = 0

    def arguments(
        self, kind: Any, arguments: Any, name: str, level: int, *, has_hints: bool = True
    ) -> dict[str, Any]:
        if not isinstance(arguments, Mapping):
            raise self.error(name, "a dictionary of arguments", f"a {type(arguments).__name__}")
        types = parameter_types(kind) if has_hints else {}
        found = {}
        for key, value in arguments.items():
            if not isinstance(key, str) or not key.isidentifier():
                raise self.error(name, "arguments by name", repr(key)[:60])
            full = f"{name}.{key}" if name else key
            found[key] = self.value(value, types.get(key, OPEN), full, level + 1)
        return found

    def value(self, value: Any, wanted: Wanted, name: str, level: int) -> Any:
        self.count += 1
        # a pickle may hold itself, or the same list a billion times
        if self.count > _MOST_VALUES or level > _MOST_LEVELS:
            limit = f"at most {_MOST_VALUES} values in {_MOST_LEVELS} levels"
            raise self.error(name[:60], limit, "more")
        if isinstance(value, str):
            return self.text(value, wanted, name, level)
        if isinstance(value, Mapping):
            if "class_path" in value:
                return self.specification(value, wanted, name, level)
            settings = [kind for kind in wanted.objects if is_dataclass(kind)]
            if len(settings) == 1:  # the parser takes such a dictionary for its arguments
                return self.arguments(settings[0], value, name, level)
            return self.dictionary(value, wanted | OPEN, name, level)
        if isinstance(value, (list, tuple, set, frozenset)):
            items = [self.value(each, wanted, name, level + 1) for each in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, Tensor) and not (wanted.is_open or Tensor in wanted.objects):
            raise self.error(name, "a setting", f"a tensor of shape {tuple(value.shape)}")
        return value

    def dictionary(
        self, value: Mapping[Any, Any], wanted: Wanted, name: str, level: int
    ) -> dict[Any, Any]:
        for key in value:
            if not isinstance(key, str) and wanted.takes_classes:
                raise self.error(name, f"a {wanted}", f"a dictionary with the key {key!r:.60}")
            # the parser takes a dot in a name for a level
            if isinstance(key, str) and "." in key and _SPECIFICATION & set(key.split(".")):
                raise self.error(name, "settings without a dot in their names", repr(key)[:60])
        return {
            key: self.value(each, wanted, f"{name}.{key}", level + 1) for key, each in value.items()
        }

    def specification(
        self, value: Mapping[str, Any], wanted: Wanted, name: str, level: int
    ) -> dict[str, Any]:
        path = value["class_path"]
        if not isinstance(path, str) or not value.keys() <= _SPECIFICATION:
            raise self.error(name, "a class_path with its init_args", str(list(value))[:60])
        full, kind = self.resolve(path, wanted, name)
        self.check(kind, path, wanted, name)
        found: dict[str, Any] = {"class_path": full}
        for key in ("init_args", "dict_kwargs"):
            if value.get(key) is not None:
                has_hints = key == "init_args"
                found[key] = self.arguments(kind, value[key], name, level, has_hints=has_hints)
        return found

    def text(self, value: str, wanted: Wanted, name: str, level: int) -> Any:
        if not (wanted.takes_classes or wanted.is_open):
            return value
        if wanted.takes_classes and (value.isidentifier() or _is_path(value)):
            is_class = not (wanted.takes_text or wanted.is_open)
            if is_class or self.trust.find(value) is not None or _namesakes(value, wanted):
                return self.class_name(value, wanted, name)
        self.check_inert(value, name, level)
        return value

    def class_name(self, value: str, wanted: Wanted, name: str) -> Any:
        full, found = self.resolve(value, wanted, name)
        if isinstance(found, type) and any(issubclass(found, base) for base in wanted.classes):
            self.check_allowed(found, value, name)
            return full
        self.check(found, value, wanted, name)
        if isinstance(found, type):
            return {"class_path": full}
        self.check_no_file(full, name)
        return full

    def resolve(self, path: str, wanted: Wanted, name: str) -> tuple[str, Any]:
        """Return the full name and what it stands for."""
        if "." not in path:
            kinds = _namesakes(path, wanted)
            if len(kinds) != 1:
                raise self.error(name, f"a {wanted} by its full path", path[:60])
            return f"{kinds[0].__module__}.{kinds[0].__qualname__}", kinds[0]
        found = self.trust.find(path)
        if found is None:
            raise self.trust.refusal(name, path)
        return path, found

    def check(self, found: Any, path: str, wanted: Wanted, name: str) -> None:
        if not self.trust.fits(found, wanted):
            raise self.error(name, f"a {wanted}", f"{path}, which is none")
        self.check_allowed(found, path, name)

    def check_allowed(self, found: Any, path: str, name: str) -> None:
        if not self.trust.allows(found):
            raise self.trust.refusal(name, path)

    def check_inert(self, value: str, name: str, level: int) -> None:
        """Raise if the parser could read more than text out of text whose hint does not say."""
        self.check_no_file(value, name)
        if len(value) > _LONGEST_TEXT:
            raise self.error(name, f"text of at most {_LONGEST_TEXT} characters", "more")
        for structure in _structures(value):
            self.value(structure, OPEN, name, level + 1)
        if not _is_path(value) or not could_be_imported(value):
            return
        found = self.trust.find(value)
        if found is None or not self.trust.fits(found, OPEN):
            raise self.trust.refusal(name, value)
        self.check_allowed(found, value, name)

    def check_no_file(self, value: str, name: str) -> None:
        if "\0" in value or os.path.isfile(value):
            raise self.error(name, "text that names no file", repr(value[:60]))

    def error(self, name: str, allowed: str, got: str) -> ValueError:
        allowed = re.sub(r"^a (?=[AEIO]|LR)", "an ", allowed)
        return ValueError(
            f"`{name or 'hyper_parameters'}` in the checkpoint {self.trust.path} must be "
            f"{allowed}, got {got}: do not use a checkpoint of an author whom you do not trust, or "
            f"give the argument yourself."
        )


def _is_path(text: str) -> bool:
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _structures(text: str) -> Iterator[Any]:
    """Yield the lists and dictionaries that the parser may read out of text."""
    for load in (json.loads, yaml.safe_load):
        with suppress(Exception):  # whatever they make of a text that is neither JSON nor YAML
            found = load(text)
            if isinstance(found, (list, dict)):
                yield found


def _namesakes(name: str, wanted: Wanted) -> list[type]:
    """Return the classes with a short name among those that an argument takes."""
    bases = wanted.objects + wanted.made + wanted.classes
    kinds = dict.fromkeys(kind for base in bases for kind in _below(base))
    return [kind for kind in kinds if kind.__name__ == name]


def _below(kind: type) -> Iterator[type]:
    yield kind
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        yield from _below(child)
