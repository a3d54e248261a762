"""The lines of a configuration that select an estimator, to be given after another one."""

import inspect
from typing import Any

import yaml

from lightning_vr.lifecycle.configuration import imported


def pasted_configuration(chosen: dict[str, Any], present: dict[str, Any]) -> str:
    """Return YAML that changes a module's slots.

    Args:
        chosen: Descriptions of what the slots are to hold.
        present: Descriptions of what they hold now, by which configurations merge.
    """
    slots = {name: _pasteable(slot, present.get(name)) for name, slot in chosen.items()}
    return str(yaml.safe_dump({"model": {"init_args": slots}}, sort_keys=False))


def _pasteable(described: Any, present: Any = None) -> Any:
    """Return a described object with its short name, without arguments at their defaults.

    Configurations merge: an argument of a present object of the same class stays unless named.
    """
    if not isinstance(described, dict) or "class_path" not in described:
        return described
    kind: Any = imported(described["class_path"])
    is_same = isinstance(present, dict) and present.get("class_path") == described["class_path"]
    before = present.get("init_args", {}) if is_same else {}
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    arguments = {
        name: _pasteable(value, before.get(name))
        for name, value in described.get("init_args", {}).items()
        if value != defaults.get(name) or value != before.get(name, value)
    }
    is_ours = described["class_path"].startswith("lightning_vr.")
    short = {"class_path": kind.__name__ if is_ours else described["class_path"]}
    return short | ({"init_args": arguments} if arguments else {})
