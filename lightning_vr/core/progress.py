"""The progress bar of everything that may take longer than a second."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

_Item = TypeVar("_Item")


def progress_bar(items: Iterable[_Item], title: str, *, is_shown: bool) -> Iterable[_Item]:
    """Return items with a progress bar, which appears after a second and disappears at the end.

    Args:
        items: What is iterated over.
        title: Text in front of the bar.
        is_shown: Whether to show the bar where the output is a terminal.
    """
    bar: Iterable[_Item] = _bar(items, title, is_shown)
    return bar


@contextmanager
def progress_steps(total: int | None, title: str, *, is_shown: bool) -> Iterator[Callable[[], Any]]:
    """Show a progress bar for steps that are no loop; call what it gives after each step.

    Args:
        total: Number of steps; None if nobody knows, which shows their count alone.
        title: Text in front of the bar.
        is_shown: Whether to show the bar where the output is a terminal.
    """
    with _bar(None, title, is_shown, total=total) as bar:
        yield bar.update


def _bar(items: Any, title: str, is_shown: bool, **options: Any) -> Any:
    hidden = None if is_shown else True  # None hides it where the output is no terminal
    return tqdm(items, title, leave=False, delay=1, disable=hidden, **options)
