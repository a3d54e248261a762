"""Runs whose pictures are not looked at: to draw them would take most of the time."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="module")
def no_pictures():
    """Write no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        yield
