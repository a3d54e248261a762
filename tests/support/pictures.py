"""Runs whose pictures are not looked at: to draw them would take most of the time."""

import pytest
from matplotlib.figure import Figure
from PIL import Image


def _blank(figure, file, *_, **__):
    Image.new("L", (1, 1)).save(file, "png")


@pytest.fixture
def no_pictures(request, monkeypatch):
    """Write blank pictures, but in tests that are marked with ``pictures``."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(Figure, "savefig", _blank)


class _NoFigure:
    """A figure, and all that is made on it, on which nothing is drawn."""

    def __init__(self, **_):
        pass

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self

    savefig = _blank


@pytest.fixture(scope="module")
def no_pictures_in_module():
    """Draw nothing and write blank pictures, in fixtures of the module too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure", _NoFigure)
        yield
