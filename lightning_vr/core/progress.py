"""The progress bar of everything that may take longer than a second."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

_Item = TypeVar("_Item")


def progress_bar(items: Iterable[_Item], title: str, *, is_shown: bool) -> Iterable[_Item]:
    """Return items with a progress bar, which appears after a second and disappears at the end.

    Args:
        items: What is iterated over.
        title: Text in front of the bar.
        is_shown: Whether to show the bar where the output is a terminal.
    """
    hidden = None if is_shown else True  # None hides it where the output is no terminal
    bar: Iterable[_Item] = tqdm(items, title, leave=False, delay=1, disable=hidden)
    return bar
