"""Scripts of the evidence as modules."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

EVIDENCE = Path(__file__).parents[2] / "examples/evidence"


@pytest.fixture
def load(monkeypatch):
    """Import scripts of the evidence, which are gone afterwards: other studies have such names."""
    monkeypatch.setattr(sys, "path", [str(EVIDENCE), *sys.path])
    before = dict(sys.modules)
    yield import_module
    for name in sys.modules.keys() - before.keys():
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent.parent == EVIDENCE.parent:
            del sys.modules[name]
