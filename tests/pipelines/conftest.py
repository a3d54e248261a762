"""A model of text that several files ask for."""

import pytest
from text_models import fitted, of_text

from lightning_vr import export


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A trained model of text, and the folder that it went out to."""
    folder = tmp_path_factory.mktemp("text")
    module = fitted(of_text(folder))
    export(module, folder / "out")
    return module, folder / "out"
