"""Score distillation with a frozen teacher, against the same estimate written out."""

import pytest
import torch
from torch import nn

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.distillation import distillation_loss
from lightning_vr.estimators.draws import IID
from lightning_vr.estimators.proposals import WeightProposal
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import VP
from lightning_vr.process.timesteps import Uniform
from lightning_vr.process.weightings import MinSNRWeighting

OBJECTIVE = Objective(VP(), Uniform(0.05, 0.95), MinSNRWeighting(), "x0")


def renderer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def teacher(noised):
    """A noise prediction that is not linear in x_t, minus the noise."""
    return torch.tanh(noised.xt * (1 + noised.t[:, None])) - noised.noise


def gradient(draws, residual=teacher, key=0, count=6, **options):
    upstream = renderer()
    views = torch.randn(count, 2, generator=generator("views"), dtype=torch.float64)
    clean = Clean(upstream(views))
    distillation_loss(clean, residual, draws, OBJECTIVE, generator(key), **options).backward()
    return torch.cat([p.grad.flatten() for p in upstream.parameters()])


@pytest.mark.parametrize("draws", [IID(), CARV(4, WeightProposal()), CARV(2, antithetic=True)])
def test_the_gradient_is_that_of_each_output_against_its_mean_weighted_residual(draws):
    upstream = renderer()
    views = torch.randn(6, 2, generator=generator("views"), dtype=torch.float64)
    x = upstream(views)
    noised = draws(Clean(x.detach()), OBJECTIVE, generator(0))
    weight = noised.weight * OBJECTIVE.weight(noised.t)
    directions = weight[:, None] * teacher(noised)
    expected = 0
    for row, direction in enumerate(directions):
        sample = row // draws.draws_per_sample
        parts = torch.autograd.grad(
            (x[sample] * direction).sum(), upstream.parameters(), retain_graph=True
        )
        expected = expected + torch.cat([p.flatten() for p in parts]) / len(directions)
    torch.testing.assert_close(gradient(draws), expected, rtol=1e-5, atol=1e-8)


def test_chunks_of_the_teacher_change_nothing():
    calls = []

    def counted(noised):
        calls.append(len(noised.t))
        return teacher(noised)

    whole = gradient(CARV(4), counted)
    torch.testing.assert_close(gradient(CARV(4, chunk_size=5), counted), whole)
    assert calls == [24, 5, 5, 5, 5, 4]


def test_the_upstream_has_one_backward_pass_and_the_teacher_none():
    upstream, passes = renderer(), []
    upstream[2].register_full_backward_hook(lambda *_: passes.append(1))
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    clean = Clean(upstream(torch.ones(5, 2, dtype=torch.float64)))
    residual = lambda noised: parameter * teacher(noised)  # noqa: E731
    distillation_loss(clean, residual, CARV(8), OBJECTIVE, generator(0)).backward()
    assert passes == [1]
    assert parameter.grad is None


def test_more_draws_leave_the_mean_and_lower_the_variance():
    found = {
        resamples: torch.stack([gradient(CARV(resamples, scope="none"), key=i) for i in range(400)])
        for resamples in (1, 4)
    }
    one, four = found[1], found[4]
    error = ((one.var(0) + four.var(0)) / 400).sqrt()
    assert ((one.mean(0) - four.mean(0)).abs() < 4.5 * error).all()
    # the views are the same in all repetitions: all variance is within samples
    assert float(one.var(0).sum() / four.var(0).sum()) == pytest.approx(4, rel=0.15)


def test_one_draw_may_be_clipped_or_normalised():
    def normalised(noised):
        direction = teacher(noised)
        return direction / direction.abs().mean(1, keepdim=True)

    torch.testing.assert_close(gradient(IID(), normalize=True), gradient(IID(), normalised))
    free, loose, tight = (gradient(IID(), clip=clip) for clip in (None, 1e6, 1e-3))
    torch.testing.assert_close(free, loose)
    assert float(tight.norm()) < 1e-2 * float(free.norm())


@pytest.mark.parametrize("option", [{"clip": 1.0}, {"normalize": True}])
def test_clipping_or_normalising_single_draws_of_several_raises(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` must be off with 4 draws"):
        gradient(CARV(4), **option)
