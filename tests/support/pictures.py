"""Runs whose pictures are not looked at: to draw them would take most of the time."""

import pytest
from PIL import Image


class _NoFigure:
    """A figure, and all that is made on it, on which nothing is drawn."""

    def __init__(self, **_):
        pass

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self

    def savefig(self, file, *_, **__):
        """Write a blank picture."""
        Image.new("L", (1, 1)).save(file, "png")


def _draw_nothing(patch):
    patch.setattr("matplotlib.figure.Figure", _NoFigure)


@pytest.fixture
def no_pictures(request, monkeypatch):
    """Draw nothing and write blank pictures, but in tests that are marked with ``pictures``."""
    if request.node.get_closest_marker("pictures") is None:
        _draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def no_pictures_in_module():
    """The same in fixtures of the module too."""
    with pytest.MonkeyPatch.context() as patch:
        _draw_nothing(patch)
        yield
