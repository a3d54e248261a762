"""The kernel distance is torchmetrics', and its mean is that of the formula."""

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_vr.core.rng import generator
from lightning_vr.metrics import RandomConvFeatures, kernel_distance

IMAGES = torch.randn(2, 60, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_it_is_that_of_torchmetrics_on_the_same_features():
    features = RandomConvFeatures()
    real, generated = features(IMAGES[0]).double(), features(2 * IMAGES[1]).double()
    metric = KernelInceptionDistance(nn.Identity(), subsets=20, subset_size=30)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    torch.manual_seed(generator("subsets").initial_seed())
    expected = float(metric.compute()[0])

    state = torch.get_rng_state()
    found = kernel_distance(real, generated, generator("subsets"), subsets=20, subset_size=30)
    assert found == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_over_whole_sets_it_is_the_unbiased_discrepancy_of_the_cubic_kernel(source):
    real, generated = torch.randn(2, 12, 3, generator=source, dtype=torch.float64)
    total = 0.0
    for a, b, sign in ((real, real, 1), (generated, generated, 1), (real, generated, -2)):
        pairs = [(i, j) for i in range(12) for j in range(12) if a is not b or i != j]
        kernel = [(float(a[i] @ b[j]) / 3 + 1) ** 3 for i, j in pairs]
        total += sign * sum(kernel) / len(kernel)
    found = kernel_distance(real, generated, source, subsets=2, subset_size=12)
    assert found == pytest.approx(total, rel=1e-10)


def test_subsets_larger_than_a_set_are_refused(source):
    points = torch.randn(20, 2)
    with pytest.raises(ValueError, match=r"`subset_size` must be at most 20, .* got 21"):
        kernel_distance(points, torch.randn(30, 2), source, subset_size=21)
