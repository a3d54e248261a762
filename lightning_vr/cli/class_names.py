"""A short class name that torch and Lightning both use: the class that says what it monitors.

torch's ``ReduceLROnPlateau`` does not name the metric that it looks at, Lightning's subclass of the
same name does. jsonargparse refuses the name as that of two classes. Seen in jsonargparse 4.49 to
4.53, in ``_typehints.resolve_class_path_by_name``; ``tests/cli/test_parsing.py`` fails when it
changes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import _typehints
from lightning.pytorch.cli import ReduceLROnPlateau

_NAME = ReduceLROnPlateau.__name__
_PATH = f"{ReduceLROnPlateau.__module__}.{_NAME}"


@contextmanager
def monitored_plateau() -> Iterator[None]:
    """Parse with ``ReduceLROnPlateau`` as the name of Lightning's, for the duration of the context.

    Full class paths, and arguments that take no such class, are read as before.
    """
    resolve: Callable[..., str] = _typehints.resolve_class_path_by_name

    def resolve_plateau(cls: Any, name: str) -> str:
        if name == _NAME and _PATH in _typehints.get_all_subclass_paths(cls):
            return _PATH
        return resolve(cls, name)

    _typehints.resolve_class_path_by_name = resolve_plateau
    try:
        yield
    finally:
        _typehints.resolve_class_path_by_name = resolve
