"""Audits whose budget is a number of looks at the clock, and whose steps are equally long."""

import pytest
from support.audits import counted_looks


@pytest.fixture(autouse=True, scope="module")
def looks():
    """Count looks in every test of this room."""
    with counted_looks():
        yield
