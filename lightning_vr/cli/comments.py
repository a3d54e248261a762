"""Values on the command line that begin with ``#``, as colours do, as the text that they are.

YAML reads such a value as a comment, and jsonargparse hands it on as None, also where an argument
is text. Seen in jsonargparse 4.49 to 4.53.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import _loaders_dumpers


@contextmanager
def comments_as_text() -> Iterator[None]:
    """Read a single line that begins with ``#`` as text, for the duration of the context."""
    load = _loaders_dumpers.loaders["yaml"]

    def load_line(text: str, **options: Any) -> Any:
        is_line = text.startswith("#") and "\n" not in text
        return text if is_line else load(text, **options)

    _loaders_dumpers.loaders["yaml"] = load_line
    try:
        yield
    finally:
        _loaders_dumpers.loaders["yaml"] = load
