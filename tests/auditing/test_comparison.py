"""What repetitions of a look say together."""

import pytest
import torch

from lightning_vr.auditing.candidates import CURRENT, Candidate
from lightning_vr.auditing.comparison import Comparison
from lightning_vr.estimators.carv import CARV
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.components import Components


def compared(variance, seconds, scales=(0.9, 1.0, 1.1), squared_mean=0.1):
    """Three repetitions of a rival and of the current estimator, of variance 1 in a second."""
    comparison = Comparison(DiffusionModule(ResidualMLP()), batch=10)
    rival = Candidate("rival", draws=CARV(2))
    for candidate, factors, times in (
        (Candidate(CURRENT), [(scale, 1.0) for scale in (0.9, 1.0, 1.1)], 1.0),
        (rival, [(scale, variance) for scale in scales], seconds),
    ):
        for scale, factor in factors:
            total = torch.tensor([factor * scale], dtype=torch.float64)
            signal = torch.tensor([squared_mean], dtype=torch.float64)
            comparison.add(candidate, Components(*[total] * 4, signal), times)
    return comparison, rival


def test_what_repetitions_share_cancels_in_the_ratios():
    comparison, rival = compared(0.5, 0.8)
    found = comparison.estimator(rival)
    assert found.efficiency == pytest.approx([2.0] * 3)
    assert found.multiplier == pytest.approx([2.5] * 3)
    assert found.draws_per_sample == 2
    assert float(found.components.total[0]) == pytest.approx(0.5)
    # B ‖μ‖² = 1 is as large as the variance: (1 + 1) / (1 + 0.5) / 0.8
    assert found.predicted_speedup.estimate == pytest.approx(2 / 1.5 / 0.8)


def test_other_work_of_the_machine_does_not_change_what_is_likely():
    comparison, rival = compared(0.5, 0.8)
    undisturbed = comparison.estimator(rival).predicted_speedup.estimate
    assert comparison.likely_speedup(rival) == pytest.approx(undisturbed)
    comparison.present.seconds[:] = [1.0, 7.0, 1.1]
    comparison._found[rival.name].seconds[:] = [40.0, 0.8, 60.0]
    assert comparison.likely_speedup(rival) == pytest.approx(undisturbed)
    disturbed = comparison.estimator(rival).predicted_speedup
    # the interval says how little is known
    assert disturbed.estimate < undisturbed / 3
    assert disturbed.low < undisturbed < disturbed.high


def test_more_finalists_make_the_interval_of_all_at_once_wider():
    comparison, rival = compared(0.5, 1.0, scales=(1.1, 1.0, 0.9))
    assert comparison.estimator(rival).simultaneous is None
    one, five = (comparison.estimator(rival, count) for count in (1, 5))
    assert one.simultaneous == one.predicted_speedup == five.predicted_speedup
    assert five.simultaneous.low < one.simultaneous.low < 1.33 < one.simultaneous.high
    assert five.is_finalist


def test_a_signal_that_is_not_resolved_saves_what_the_variance_does():
    comparison, rival = compared(0.5, 1.0, squared_mean=-0.3)
    assert comparison.estimator(rival).predicted_speedup == pytest.approx([2.0] * 3)


def test_the_current_estimator_counts_all_looks():
    first, second = compared(0.5, 1.0)[0], compared(0.5, 1.0)[0]
    both = first.present.plus(second.present)
    found = first.current(both)
    assert len(both.seconds) == 6
    assert found.name == CURRENT
    assert not found.is_finalist
    assert set(found.config) == {"draws", "target"}
    error = float(first.current(first.present).errors.total[0])
    assert float(found.errors.total[0]) == pytest.approx(error * (3 / 6 * 4 / 5) ** 0.5)
