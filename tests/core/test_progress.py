"""Progress bars: all items pass, and nothing is written where no bar is wanted."""

import sys

import pytest

from lightning_vr.core.progress import progress_bar, progress_steps


def in_a_loop(is_shown):
    assert list(progress_bar(range(3), "Counting", is_shown=is_shown)) == [0, 1, 2]


def in_steps(is_shown):
    with progress_steps(None, "Counting", is_shown=is_shown) as advance:
        for _ in range(3):
            advance()


@pytest.mark.parametrize("count", [in_a_loop, in_steps])
@pytest.mark.parametrize(
    ("is_shown", "is_terminal", "is_written"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_a_bar_is_written_to_a_terminal_only_and_only_if_it_is_wanted(
    monkeypatch, capsys, count, is_shown, is_terminal, is_written
):
    times = iter(range(0, 1000, 2))  # every look at the clock is two seconds after the last
    monkeypatch.setattr("tqdm.std.time", lambda: next(times))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    count(is_shown)
    assert ("Counting" in capsys.readouterr().err) == is_written
