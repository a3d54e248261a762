"""Copies of training samples are told from new samples, with the right probability."""

import pytest
import torch
from scipy.stats import betabinom

from lightning_vr.metrics import memorisation
from lightning_vr.metrics.memorisation import beta_binomial_tail


def points(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TRAIN, HELD_OUT = points(300, 4), points(200, 4, seed=1)


def test_a_few_copies_are_found_and_new_samples_are_not():
    new = points(200, 4, seed=2)
    assert memorisation(TRAIN, HELD_OUT, [new]).p_value > 0.05
    some = torch.cat([new[:170], TRAIN[:30] + 1e-3])
    found = memorisation(TRAIN, HELD_OUT, [some, some])
    assert found.p_value < 1e-6
    assert found.fractions == [pytest.approx(0.15 + 0.05 * 0.85, abs=0.04)] * 2
    assert found.expected == pytest.approx(0.05, abs=0.001)


def test_the_threshold_is_the_quantile_of_held_out_distances():
    distances = torch.cdist(HELD_OUT.double(), TRAIN.double()).min(1).values.sort().values
    found = memorisation(TRAIN, HELD_OUT, [HELD_OUT])
    assert found.threshold == pytest.approx(float(distances[9]))
    assert found.fractions == [9 / 200]  # strictly closer


def test_without_memorisation_the_probability_is_uniform(z_score):
    found = []
    for seed in range(200):
        draws = points(80 + 40 + 40, 2, seed=100 + seed)
        found.append(memorisation(draws[:80], draws[80:120], [draws[120:]], 0.2).p_value)
    # counts are whole: the probability of one at least as large lies a little above
    values = torch.tensor(found)
    assert float((values < 0.05).double().mean()) < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert float(values.mean()) == pytest.approx(0.55, abs=0.1)


@pytest.mark.parametrize("least", [0, 1, 7, 30])
def test_the_tail_is_that_of_scipy(least):
    expected = betabinom.sf(least - 1, 30, 3, 12)
    assert beta_binomial_tail(least, 30, 3, 12) == pytest.approx(expected, rel=1e-9)


def test_too_few_held_out_samples_are_refused():
    with pytest.raises(ValueError, match=r"at least 20 held-out samples .* got 19"):
        memorisation(TRAIN, HELD_OUT[:19], [TRAIN])
    with pytest.raises(ValueError, match="`quantile` must be between 0 and 1, got 1"):
        memorisation(TRAIN, HELD_OUT, [TRAIN], 1.0)
