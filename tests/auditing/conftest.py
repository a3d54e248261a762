"""Audits whose budget is a number of looks at the clock, and whose steps are equally long."""

from types import SimpleNamespace

import pytest

from lightning_vr.auditing import measurement as measuring
from lightning_vr.core import devices


class Clock:
    """Time that passes by a second at each look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True, scope="module")
def looks():
    """Count budgets in looks: what is measured, and how often, is not left to the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "time", SimpleNamespace(perf_counter=Clock()))
        # what is timed takes a second, whatever it is
        patch.setattr(devices, "time", SimpleNamespace(perf_counter=Clock()))
        yield
