"""The term of a learned variance: its optimum, what it leaves alone, and what it goes with."""

from dataclasses import replace

import diffusers
import pytest
import torch
from support.gaussian_reverse import STD, TwoHalves, best_variance, exact, scheduler, table
from support.networks import small_mlp, small_unet

from lightning_vr import (
    CARV,
    DSM,
    STF,
    VP,
    Clean,
    Diffusion,
    LearnedProposal,
    LearnedVariance,
    TableProposal,
    TaylorCV,
    Uniform,
    VariationalBound,
)
from lightning_vr.core.types import TargetEstimate, Times
from lightning_vr.estimators.draws import IID
from lightning_vr.process.network_calls import NetworkOutput
from lightning_vr.process.reverse_steps import ReverseSteps
from lightning_vr.process.weightings import Weighting

STEPS = 20


def model(variance=None, network=None, **options):
    variance = LearnedVariance(weight=0.3) if variance is None else variance
    return Diffusion(
        network or TwoHalves(),
        schedule=scheduler(STEPS),
        prediction="epsilon",
        variance=variance or None,
        **options,
    )


def draws(of, source, count=64, group=None):
    clean = Clean(STD * torch.randn(count, 2, generator=source), group=group)
    return of.draw(clean, source, of.draws.times(clean, of.objective, source))


def gradients(of, noised, target):
    of.zero_grad()
    estimate = of.compute_loss(noised, target)
    estimate.loss.backward()
    return {name: p.grad for name, p in of.network.named_parameters()}


def exact_output(v):
    """Return a network of the exact mean that says v for each timestep."""
    schedule = table(STEPS)
    estimate = exact(schedule)

    def network(x, noised):
        x0 = estimate(noised.xt, noised.t).x0
        alpha, sigma = noised.alpha[:, None], noised.sigma[:, None]
        noise = (noised.xt - alpha * x0) / sigma
        return NetworkOutput(noise, v[noised.t.long()][:, None].expand_as(x0))

    return network, estimate


def fitted(noised, objective, target_is_mean):
    """Return the variance of each step that has the least bound on some draws."""
    v = torch.zeros(STEPS, dtype=torch.float64, requires_grad=True)
    network, estimate = exact_output(v)
    if target_is_mean:
        mean = estimate(noised.xt, noised.t).x0
        # the noise that would have made x_t of it
        noise = (noised.xt - noised.alpha[:, None] * mean) / noised.sigma[:, None]
        noised = replace(noised, x0=mean, noise=noise)
    optimizer = torch.optim.LBFGS([v], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = LearnedVariance(1.0).term(network(None, noised), noised, objective).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    steps = ReverseSteps.of(objective.schedule)
    return steps, steps.log_variance(v.detach(), "learned", v.detach()).exp()


@pytest.mark.parametrize("target_is_mean", [False, True])
def test_it_learns_the_best_variance_and_collapses_with_the_posterior_mean_as_its_target(
    target_is_mean, source
):
    of = model()
    # of the first step the likelihood has no bound where the target is the mean
    least = 1 if target_is_mean else 0
    t = torch.arange(least, STEPS).double().repeat_interleave(2000)
    clean = Clean(STD * torch.randn(len(t), 2, generator=source, dtype=torch.float64))
    noised = IID().noise(clean, of.schedule, Times(t, torch.ones_like(t)), source)
    steps, found = fitted(noised, of.objective, target_is_mean)
    best, beta_tilde = best_variance(steps), steps.log_beta_tilde.exp()
    if target_is_mean:
        torch.testing.assert_close(found[1:], beta_tilde[1:], rtol=0.02, atol=0)
        assert float((best / beta_tilde)[1]) > 1.3
    else:
        torch.testing.assert_close(found, best, rtol=0.05, atol=0)


def test_the_mean_has_the_gradient_of_its_own_loss_alone_bit_by_bit(source):
    plain, learned = model(variance=False), model(LearnedVariance(weight=7.0))
    noised, target = draws(plain, source)
    expected, found = (gradients(each, noised, target) for each in (plain, learned))
    for name in ("mean.weight", "mean.bias"):
        assert torch.equal(found[name], expected[name])
    assert float(expected["variance.weight"].abs().sum()) == 0
    assert float(found["variance.weight"].abs().sum()) > 0
    assert not torch.equal(found["body.weight"], expected["body.weight"])


def test_the_variance_learns_from_the_sample_itself_whatever_the_target_of_the_mean(source):
    of = model()
    noised, target = draws(of, source)
    smooth = exact(of.schedule)(noised.xt, noised.t).x0.float()
    other = TargetEstimate(smooth, target.ess, target.spread)
    expected, found = (gradients(of, noised, each) for each in (target, other))
    for name in ("variance.weight", "variance.bias"):
        assert torch.equal(found[name], expected[name])
    assert not torch.equal(found["mean.weight"], expected["mean.weight"])


def test_with_stf_and_carv_the_variance_learns_what_it_learns_with_the_plain_target():
    found = {}
    for target in (DSM(), STF("batch")):
        source = torch.Generator().manual_seed(1)
        of = model(draws=CARV(2), target=target)
        noised, estimate = draws(of, source)
        assert len(noised.t) == 128
        found[type(target)] = gradients(of, noised, estimate), estimate.x0
    (plain, x0), (smooth, mean) = found.values()
    assert not torch.equal(x0, mean)
    for name in ("variance.weight", "variance.bias"):
        assert torch.equal(smooth[name], plain[name])
    assert not torch.equal(smooth["mean.weight"], plain["mean.weight"])


@pytest.mark.parametrize(
    "own", [IID(), CARV(4, TableProposal([1.0] * 10 + [3.0] * 10), chunk_size=1000)]
)
def test_its_mean_is_the_weighted_bound_of_the_data_for_any_draws(own, source, z_score):
    of = model(draws=own)
    clean = Clean(STD * torch.randn(8000, 2, generator=source))
    with torch.no_grad():
        found = of.loss(clean, source)
        terms = VariationalBound().terms(
            of.reverse_estimate, of.schedule, clean.x0, source, variances=["learned"]
        )
    expected = 0.3 * terms["learned"][:, :-1].sum(dim=1)  # without the divergence of the end
    per_sample = found.bound.reshape(len(clean.x0), -1).mean(dim=1)
    error = (per_sample.var() / len(per_sample) + expected.var() / len(expected)).sqrt()
    assert abs(float((per_sample.mean() - expected.mean()) / error)) < 4
    torch.testing.assert_close(found.loss, (found.per_draw + found.bound).mean())


def test_chunks_give_the_same_terms_and_gradients(source):
    whole, parts = (model(draws=CARV(4, chunk_size=size)) for size in (None, 7))
    noised, target = draws(whole, source, count=8)
    found, expected = (each.compute_loss(noised, target) for each in (parts, whole))
    for name in ("loss", "per_draw", "bound"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    found, expected = (gradients(each, noised, target) for each in (parts, whole))
    torch.testing.assert_close(found, expected)


def test_dropped_labels_are_dropped_for_the_variance_too(source):
    options = {"num_classes": 3, "network": TwoHalves(4)}
    dropped, plain = model(label_dropout=1.0, **options), model(**options)
    noised, target = draws(dropped, source, group=torch.arange(64) % 3)
    found = dropped.compute_loss(noised, target).bound
    expected = plain.compute_loss(replace(noised, group=None), target).bound
    assert torch.equal(found, expected)


def test_pixels_have_the_likelihood_of_their_bins(source):
    pixels = Clean(torch.randint(4, (64, 2), generator=source) / 1.5 - 1)
    of, continuous = (model(LearnedVariance(0.3, levels=n)) for n in (4, None))
    noised, target = of.draw(pixels, source, of.draws.times(pixels, of.objective, source))
    a, b = (each.compute_loss(noised, target).bound for each in (of, continuous))
    first = noised.t == 0
    assert torch.equal(a[~first], b[~first])
    assert bool((a[first] >= 0).all())
    with pytest.raises(ValueError, match="`levels` must be the number of values"):
        of.loss(Clean(torch.full((4, 2), 0.123)), source)


def test_the_moment_of_the_bound_is_the_loss_aware_sampling_of_improved_ddpm(source):
    """Their equation 18 and the 0.001 of their code, after ten losses of each timestep."""
    losses = torch.rand(STEPS, 10, generator=source, dtype=torch.float64) ** 3
    weights = losses.square().mean(dim=1).sqrt()
    expected = 0.999 * weights / weights.sum() + 0.001 / STEPS
    proposal = LearnedProposal("bound", bins=STEPS, floor=0.001)
    v = ((torch.arange(STEPS) + 0.5) / STEPS)[:, None].expand_as(losses).flatten()
    proposal.observe(v, torch.ones_like(v), torch.ones_like(v), losses.flatten())
    proposal.advance()
    h = proposal(model().objective, torch.device("cpu"))
    torch.testing.assert_close(h(v.double())[::10] / STEPS, expected)


def test_draws_learn_from_the_bound_without_importance_weights(source):
    proposal = LearnedProposal("bound", bins=2)
    of = model(draws=CARV(2, proposal))
    proposal.table[:] = torch.tensor([[1.0, 9.0], [1.0, 1.0], [8.0, 8.0]])
    estimate = of.compute_loss(*draws(of, source))
    assert float(estimate.noised.weight.max()) > float(estimate.noised.weight.min())
    of.draws.observe(estimate, of.objective)
    bound = (estimate.bound / estimate.noised.weight).detach().double()
    late = estimate.noised.t >= STEPS / 2
    expected = torch.stack([bound[~late].square().sum(), bound[late].square().sum()])
    torch.testing.assert_close(proposal.observed[0], expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Diffusion(TwoHalves(), VP(), variance=LearnedVariance()), "got VP, which has no"),
        (
            lambda: Diffusion(
                TwoHalves(),
                diffusers.FlowMatchEulerDiscreteScheduler(),
                "velocity",
                variance=LearnedVariance(),
            ),
            "got FlowMatchEulerDiscreteScheduler, which has no steps",
        ),
        (lambda: model(timesteps=Uniform(0, 19)), "`timesteps` must be the 20 timesteps"),
        (lambda: model(control_variate=TaylorCV()), "`control_variate` must be None"),
        (
            lambda: model(
                draws=CARV(1, TableProposal([0.0] + [1.0] * 19)), weighting=NoWeightAtZero()
            ),
            "`proposal` must be positive at every timestep with `variance`.* zero at 0",
        ),
        (
            lambda: Diffusion(small_mlp(), draws=CARV(1, LearnedProposal("bound"))),
            "`moment` must be 'gradient' or 'loss' without `variance`",
        ),
        (lambda: model(network=small_unet()), "twice as many output as input channels"),
        (lambda: OwnPredict(TwoHalves(), scheduler(), "epsilon", variance=LearnedVariance()),
         "override `predict_with_variance` instead"),
        (lambda: LearnedVariance(0.0), "`weight` must be positive"),
        (lambda: LearnedVariance(levels=1), "`levels` must be at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_learn_a_variance_is_refused_when_it_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_network_that_says_nothing_about_the_variance_is_refused_at_the_first_batch(source):
    with pytest.raises(ValueError, match="`network` must return twice the channels"):
        model(network=small_mlp()).loss(torch.zeros(2, 2), source)


class NoWeightAtZero(Weighting):
    """A weighting that leaves out the first timestep."""

    def forward(self, schedule, t):
        return (t > 0).to(t)


class OwnPredict(Diffusion):
    """A model that calls its network itself."""

    def predict(self, x, noised):
        return self.network(x, noised.t)[:, :2]
