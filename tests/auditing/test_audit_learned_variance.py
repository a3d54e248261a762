"""What an audit does with a model that learns its variance."""

from itertools import repeat

import torch
from support.gaussian_reverse import TwoHalves, scheduler
from support.points import normal_points

from lightning_vr import (
    CARV,
    Candidate,
    Clean,
    DiffusionModule,
    LearnedProposal,
    LearnedVariance,
    TaylorCV,
)
from lightning_vr.auditing.preparation import learn, refused
from lightning_vr.core.rng import generator
from lightning_vr.training.noisy_losses import DiffusionLoss


def learned(moment, variance):
    """Return the table that a proposal learns, which always draws from p."""
    module = DiffusionModule(TwoHalves(), scheduler(20), "epsilon", variance=variance)
    candidate = Candidate(moment, draws=CARV(1, LearnedProposal(moment, bins=2, floor=1.0)))
    batches = repeat(Clean(normal_points(64, 1)))
    assert learn(DiffusionLoss(module), [candidate], batches, generator, lambda: False) == {}
    return candidate.draws.proposal.table


def test_draws_learn_the_bound_from_the_bound_alone_and_the_gradient_without_it():
    small, large = LearnedVariance(weight=1.0), LearnedVariance(weight=3.0)
    assert torch.equal(learned("gradient", large), learned("gradient", None))
    torch.testing.assert_close(learned("bound", large)[0], 9 * learned("bound", small)[0])


def test_control_variates_are_refused():
    module = DiffusionModule(TwoHalves(), scheduler(20), "epsilon", variance=LearnedVariance())
    reasons = refused(module, [Candidate("Taylor", control_variate=TaylorCV())])
    assert "`control_variate` must be None with `variance`" in reasons["Taylor"]
