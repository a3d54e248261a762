"""Values of arguments within a class, given on the command line, as they were written.

jsonargparse loads ``null`` and ``[null, 1]`` as Python objects, and hands them to the parser of the
class as Python prints them: as the words ``None`` and ``[None, 1]``, which YAML reads as text. Here
they are handed on as JSON, which YAML reads as what it was. Seen in jsonargparse 4.49 to 4.53, in
``_typehints.adapt_class_type``; ``tests/cli/test_parsing.py`` fails when it changes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _typehints, _util


@contextmanager
def values_as_written() -> Iterator[None]:
    """Parse with nested values handed on as JSON, for the duration of the context."""
    adapt: Callable[..., Any] = _typehints.adapt_class_type

    def adapt_json(value: Any, *args: Any, **kwargs: Any) -> Any:
        given = value.get("init_args") if isinstance(value, Namespace) else None
        if isinstance(given, _util.NestedArg) and not isinstance(given.val, str):
            value["init_args"] = given._replace(val=_as_yaml(given.val))
        return adapt(value, *args, **kwargs)

    _typehints.adapt_class_type = adapt_json
    try:
        yield
    finally:
        _typehints.adapt_class_type = adapt


def _as_yaml(value: Any) -> str:
    """Return a value as JSON, with YAML's words for what JSON has none."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_as_yaml(k)}: {_as_yaml(x)}' for k, x in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, float) and value != value:
        return ".nan"
    if value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    return json.dumps(value, default=str)
