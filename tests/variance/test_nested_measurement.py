"""Which of the two ways a loss is measured in, and how many bins of the noise level at a time."""

import pytest
import torch

from lightning_vr import STF, VP, DiffusionModule, ResidualMLP
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.nested_measurement import NestedMeasurement


def batch(count, key=0):
    return Clean(torch.randn(count, 2, generator=generator("data", key)))


def gradients(target=None):
    network = ResidualMLP(2, width=8, depth=1)
    torch.nn.init.normal_(network.project_out.weight, std=0.3)
    module = DiffusionModule(network, VP(), target=target)
    groups = parameter_groups(module)[1]
    return GradientMeasurement(DiffusionLoss(module), lambda *key: generator(3, *key), groups)


def nested(measurement, size=8, **settings):
    return NestedMeasurement(measurement, batch(size), torch.device("cpu"), **settings)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_independent_draws_are_measured_per_sample():
    measurement = gradients()
    found = nested(measurement)
    assert found.is_per_sample
    assert found.why_by_differences is None
    assert_equal(found.whole([batch(4)], "key"), measurement.per_sample(batch(4), "key"))


def test_draws_that_share_references_are_measured_by_differences():
    measurement = gradients(STF("batch"))
    found, pair = nested(measurement), [batch(4, 0), batch(4, 1)]
    assert found.why_by_differences == "the draws of a batch depend on each other"
    assert_equal(found.whole(pair, "key"), measurement.by_differences(pair, "key"))


@pytest.mark.parametrize(("size", "samples"), [(1, 2), (15, 16)])
def test_too_few_samples_are_measured_by_differences(size, samples):
    found = nested(gradients(), size, samples=samples)
    assert found.why_by_differences == f"a batch holds fewer than {samples} samples"


def test_all_bins_are_measured_at_once_where_samples_suffice_and_in_turn_elsewhere():
    measurement = gradients()
    found = nested(measurement)
    assert set(found.levels([batch(6)], 3, 0, "key")) == {0, 1, 2}
    for number in range(6):
        ((level, components),) = found.levels([batch(5)], 3, number, "key").items()
        assert level == number % 3
        edges = {"low": level / 3, "high": (level + 1) / 3}
        assert_equal(components, measurement.per_sample(batch(5), "key", **edges))
