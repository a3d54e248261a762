"""Which candidates are measured to the end, and what their repetitions say together."""

import pytest
import torch

from lightning_vr.auditing.candidates import Candidate
from lightning_vr.auditing.comparison import CURRENT, Comparison
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.components import Components


def compared(candidate, variance, seconds=(1.0, 1.0, 1.0), **settings):
    """Three repetitions of a rival and of the current estimator, of variance 1 in a second."""
    comparison = Comparison(DiffusionModule(ResidualMLP(), **settings))
    for each, factor, times in (
        (Candidate(CURRENT), 1.0, (1.0, 1.0, 1.0)),
        (candidate, variance, seconds),
    ):
        for scale, time in zip((0.9, 1.0, 1.1), times, strict=True):
            total = torch.tensor([factor * scale], dtype=torch.float64)
            comparison.add(each, Components(*[total] * 5), torch.tensor(time))
    return comparison


@pytest.mark.parametrize("seconds", [(1e-6, 1e-6, 1e-6), (1.0, 1.0, 1.0), (1e6, 1e6, 1e6)])
@pytest.mark.parametrize("variance", [0.5, 1.0, 1.24, 1.26, 5.0])
def test_whether_a_candidate_has_lost_does_not_depend_on_the_clock(variance, seconds):
    plain = Candidate("plain", draws=CARV(1))
    assert compared(plain, variance, seconds).has_lost(plain) == (variance > 1.25)


def test_fewer_draws_may_make_up_for_their_variance_by_time():
    few = Candidate("one", draws=CARV(1))
    assert not compared(few, 4.0, draws=CARV(4)).has_lost(few)
    assert compared(few, 5.1, draws=CARV(4)).has_lost(few)
    many = Candidate("four", draws=CARV(4))
    assert compared(many, 1.3).has_lost(many)


def test_a_candidate_without_a_slot_that_takes_time_is_measured_to_the_end():
    dsm, none = Candidate("DSM", target=DSM()), Candidate("none", control_variate="none")
    assert not compared(dsm, 5.0, target=STF(8)).has_lost(dsm)
    assert not compared(none, 5.0, control_variate=TaylorCV()).has_lost(none)
    stf = Candidate("STF", target=STF(8))
    assert compared(stf, 5.0).has_lost(stf)
    assert not compared(stf, 5.0).has_lost(Candidate(CURRENT))


def test_the_multiplier_is_of_variance_and_of_time_on_common_repetitions():
    rival = Candidate("rival", draws=CARV(2))
    comparison = compared(rival, 0.5, (0.8, 0.8, 0.8))
    comparison.add(
        Candidate(CURRENT), Components(*[torch.full((1,), 9.0).double()] * 5), torch.tensor(9.0)
    )
    found = comparison.estimator(rival)
    assert found.efficiency == pytest.approx([2.0] * 3)
    assert found.multiplier == pytest.approx([2.5] * 3)
    assert found.draws_per_sample == 2
    assert comparison.relative_seconds([rival]) == pytest.approx(0.8 / 1.8)
