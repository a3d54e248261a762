"""Audits that count looks at the clock; and results that were never measured, in round numbers."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lightning_vr.auditing import Audit
from lightning_vr.auditing import measurement as measuring
from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.auditing.step_cost import StepCost
from lightning_vr.core import devices
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_statistics import GradientStatistics
from lightning_vr.variance.intervals import Interval


class Clock:
    """Time that passes by a second at each look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@contextmanager
def counted_looks():
    """Count budgets in looks: what is measured, and how often, is not left to the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "time", SimpleNamespace(perf_counter=Clock()))
        # what is timed takes a second, whatever it is
        patch.setattr(devices, "time", SimpleNamespace(perf_counter=Clock()))
        yield


def components(data=1.0, timestep=2.0, noise=7.0, squared_mean=0.1):
    values = (data, timestep, noise, data + timestep + noise, squared_mean)
    return Components(*(torch.tensor([value], dtype=torch.float64) for value in values))


def around(value, width):
    return Interval(value, value - width, value + width)


def measured(name, efficiency, seconds=0.01, width=0.05, config=None, noise_ratio=10.0, draws=1):
    """A finalist; its interval for all finalists at once is twice as wide as its own."""
    parts = components(1 / efficiency, 2 / efficiency, 7 / efficiency)
    faster = 0.01 / seconds
    saving = (1 + noise_ratio) / (1 + noise_ratio / efficiency) * faster
    return MeasuredEstimator(
        name,
        parts,
        components(0.1, 0.1, 0.1),
        seconds,
        around(efficiency, width),
        Interval(*(faster * end for end in around(efficiency, width))),
        around(saving, width),
        around(saving, 2 * width),
        config,
        draws,
    )


def first_look_only(found):
    return replace(found, simultaneous=None)


def current(squared_mean=0.1):
    one = Interval(1.0, 1.0, 1.0)
    parts = components(squared_mean=squared_mean)
    return MeasuredEstimator("current", parts, components(0.1, 0.1, 0.1), 0.01, one, one, one)


def cost_of(upstream, denoise=(1e-4, 0.9e-4, 1.1e-4)):
    return StepCost(around(1e-3, 1e-5), Interval(upstream, upstream, upstream), Interval(*denoise))


def an_audit(*rivals, noise_ratio=10.0, cost=None, upstream=1e-5, own=None, draws=1, **settings):
    statistics = GradientStatistics(["all"], torch.tensor([0.1, 1.0]))
    statistics.add(Components(*(x.repeat(2) for x in components())))
    for level in range(2):
        statistics.add_level(level, components())
    # V = 10 and B = 10 make the noise ratio 1 / squared_mean
    present = replace(current(1 / noise_ratio), config=own, draws_per_sample=draws)
    return Audit(
        [present, *rivals],
        statistics,
        10,
        cost or cost_of(upstream),
        repetitions=5,
        second_repetitions=9,
        seconds=12.0,
        budget=10.0,
        **settings,
    )
