"""YAML that the parser would not survive, or would read otherwise than it looks, is refused.

The parser recurses for ever through a node that contains itself, and takes the last of two equal
keys. So each text is composed first, and its nodes are looked at.
"""

from collections.abc import Callable
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_MOST_NODES = 1_000_000
"""Nodes of a file with its aliases written out; a few lines of aliases can stand for billions."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml_files() -> None:
    """Make the parser refuse cycles and repeated keys in YAML, in files and on the command line."""
    load = get_loader("yaml")
    if not isinstance(load, _CheckedLoad):
        set_loader("yaml", _CheckedLoad(load), exceptions=(yaml.YAMLError,))


class _CheckedLoad:
    """A loader that looks at the nodes of a text before another one builds objects of them."""

    def __init__(self, load: Callable[[str], Any]) -> None:
        self.load = load

    def __call__(self, stream: str) -> Any:
        node = yaml.compose(stream, Loader=_Loader)
        if node is not None:
            _count(node, {})
        return self.load(stream)


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of nodes below one, with aliases written out."""
    known = counts.get(id(node))
    if known == 0:
        raise _error("contains itself through an alias", node)
    if known is not None:
        return known
    counts[id(node)] = 0  # until all below it are counted
    total = 1 + sum(_count(child, counts) for child in _children(node))
    if total > _MOST_NODES:
        raise _error(f"has more than {_MOST_NODES} nodes with its aliases", node)
    counts[id(node)] = total
    return total


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _error(f"has the key {key.value!r} twice in one section", key)
            seen.add(key.value)
    return [part for pair in node.value for part in pair]


def _error(reason: str, node: yaml.Node) -> yaml.YAMLError:
    line = node.start_mark.line + 1 if node.start_mark else "?"
    return yaml.YAMLError(f"line {line} {reason}")
