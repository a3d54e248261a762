"""Cosines, noise scales and their errors from repeated measurements."""

import math

import pytest
import torch

from lightning_vr.core.rng import generator
from lightning_vr.variance.accounting import batch_scaling
from lightning_vr.variance.joint_moments import JointMoments
from lightning_vr.variance.moments import Moments
from lightning_vr.variance.signal_statistics import SignalStatistics

MEANS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.8, 0.6, 0.0, 0.0], [-0.6, 0.0, 0.8, 0.0]]).double()


def measured(*key, count=40, means=MEANS, spread=1.0):
    """Statistics of ``count`` pairs of halves, whose gradients have noise around ``means``."""
    whole = torch.cat([means.mean(0, keepdim=True), means])
    noise = torch.randn(count, 2, *whole.shape, generator=generator("signal", *key)).double()
    statistics = SignalStatistics(torch.arange(len(means)), "noise level")
    for first, second in whole + spread * noise:
        products = first @ second.mT
        variances = 0.5 * (first - second).square().sum(1)
        statistics.add(0.5 * (products + products.mT), variances)
    return statistics


def test_joint_moments_are_the_moments_of_each_number():
    values = torch.randn(7, 3, generator=generator("joint")).double()
    joint, apart = JointMoments(3), Moments(3)
    for value in values:
        joint.add(value, memory=0.9)
        apart.fade(0.9)
        apart.add(value)
    torch.testing.assert_close(joint.mean, apart.mean)
    torch.testing.assert_close(joint.covariance.diagonal().sqrt(), apart.error)
    weights = 0.9 ** torch.arange(6, -1, -1).double()
    assert joint.count == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))
    centred = values - joint.mean
    scatter = (weights[:, None] * centred).mT @ centred
    factor = weights.square().sum() / weights.sum() ** 2
    expected = factor * scatter / (weights.sum() - weights.square().sum() / weights.sum())
    torch.testing.assert_close(joint.covariance, expected)


def test_errors_of_ratios_are_their_scatter_over_repetitions():
    exact = MEANS @ MEANS.mT
    found = [measured(i, spread=0.4) for i in range(50)]
    cosines = torch.stack([s.cosines[0][1:, 1:] for s in found])
    errors = torch.stack([s.cosines[1][1:, 1:] for s in found])
    scales = torch.stack([s.noise_scales[0][1:] for s in found])
    scale_errors = torch.stack([s.noise_scales[1][1:] for s in found])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        z = (cosines[:, i, j] - exact[i, j]) / errors[:, i, j]
        assert abs(float(z.mean())) < 4 / math.sqrt(len(found))
        assert 0.8 < float(z.std()) < 1.25
    z = (scales - 4 * 0.4**2) / scale_errors
    assert bool((z.std(dim=0) < 1.4).all())
    assert bool((z.mean(dim=0).abs() < 0.5).all())


def test_a_conflict_is_told_where_there_is_one_and_rarely_elsewhere():
    conflict = measured("conflict", spread=0.3).conflict()
    assert conflict is not None
    assert (conflict.low[0], conflict.high) == (0, (2, 3))
    assert abs(conflict.cosine + 0.6) < 0.3
    orthogonal = torch.eye(4).double()
    false = [measured("none", i, means=orthogonal, spread=0.3).conflict() for i in range(40)]
    assert sum(each is not None for each in false) <= 2
    assert measured("few", count=19, spread=0.01).conflict() is None


def test_what_is_below_the_noise_is_unknown_and_bounded():
    statistics = measured("weak", count=10, means=0 * MEANS)
    assert bool(statistics.noise_scales[0][1:].isnan().all())
    assert bool((statistics.least_noise_scales > 1).all())
    assert bool(statistics.cosines[0][1:, 1:].isnan().all())
    assert measured("one", count=1).conflict() is None
    assert SignalStatistics(torch.arange(2), "time").is_empty


def test_a_saved_state_goes_on():
    first = measured("state")
    again = SignalStatistics(first.noise_levels, "noise level", first.state())
    assert torch.equal(again.cosines[0].nan_to_num(), first.cosines[0].nan_to_num())
    with pytest.raises(ValueError, match="joint moments' mean"):
        SignalStatistics(torch.arange(2), "noise level", first.state())


def test_the_batch_size_follows_the_model_of_mccandlish_and_the_square_root_rule():
    # S ∝ 1 + B_noise / B: at B = B_noise twice S_min, at B = B_noise / 4 five times
    found = batch_scaling(400.0, 100, 400)
    assert found.steps == pytest.approx(2 / 5)
    assert found.samples == pytest.approx(4 * 2 / 5)
    # lr ∝ B / (B + B_noise)
    assert found.sgd == pytest.approx((400 / 800) / (100 / 500))
    assert found.adam == pytest.approx(2)
    with pytest.raises(ValueError, match="`batch` must be positive"):
        batch_scaling(400.0, 0, 10)
