"""Ancestral sampling by exact reverse processes, and which pass the variance is of."""

import pytest
import torch
from diffusers import DDPMScheduler
from support.gaussian_reverse import STD, exact, scheduler, table

from lightning_vr.process.ancestral_sampling import AncestralSampler
from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.reverse_steps import ReverseSteps
from lightning_vr.process.schedules import VP

COUNT = 20_000


def variance_of_samples(kind, source, steps=4):
    schedule = table(1000)
    noise = torch.randn(COUNT, 1, generator=source)
    sampler = AncestralSampler(steps, kind)
    x = sampler.draw(exact(schedule, steps), schedule, noise, source=source, batch_size=COUNT)
    return x.double()


def test_with_the_exact_variance_the_samples_before_the_last_step_are_those_of_the_data(
    source, z_score
):
    """Four steps suffice: the last returns the mean of x0, whose variance is known."""
    first = ReverseSteps.of(table(1000), 4)
    signal, noise = (first.alpha[0] * STD) ** 2, first.sigma[0] ** 2
    expected = float(STD**2 * signal / (signal + noise))
    squares = {k: variance_of_samples(k, source).square() for k in ("learned", "beta_tilde")}
    assert abs(z_score(squares["learned"], expected)) < 4
    assert z_score(squares["beta_tilde"], expected) < -20


def test_steps_with_a_learned_variance_are_those_of_diffusers_scheduler():
    """``variance_type="learned_range"`` takes both halves of a network as one output."""
    schedule = table(20)
    options = {"variance_type": "learned_range", "prediction_type": "sample", "clip_sample": False}
    own = DDPMScheduler.from_config(scheduler(20).config, **options)
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def estimate(xt, t, group=None, cond=None):
        return ReverseEstimate(torch.tanh(xt), torch.sin(3 * xt))

    x, source = noise, torch.Generator().manual_seed(1)
    for t in range(19, -1, -1):
        x0, v = estimate(x, t)
        x = own.step(torch.cat([x0, v], dim=1), t, x, generator=source).prev_sample
    source.manual_seed(1)
    found = AncestralSampler(20).draw(estimate, schedule, noise, source=source)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_samples_do_not_depend_on_the_batch_size():
    schedule = table(20)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    found = [
        AncestralSampler(4).draw(
            exact(schedule, 4),
            schedule,
            noise,
            source=torch.Generator().manual_seed(1),
            batch_size=size,
        )
        for size in (2, 5)
    ]
    assert torch.equal(*found)


def test_guidance_is_of_the_mean_and_the_variance_is_that_of_the_conditional_pass():
    schedule, noise = table(20), torch.zeros(3, 2)
    group = torch.tensor([0, 1, 1])

    def estimate(xt, t, group, cond):
        if group is None:  # the variance would be infinite
            return ReverseEstimate(torch.ones_like(xt), torch.full_like(xt, torch.inf))
        return ReverseEstimate(3 * torch.ones_like(xt), torch.full_like(xt, -1.0))

    found = AncestralSampler(2, guidance=2.0).draw(estimate, schedule, noise, group=group)
    assert torch.equal(found, torch.full((3, 2), 5.0))
    clipped = AncestralSampler(2, guidance=2.0, clip_sample=True)
    assert torch.equal(clipped.draw(estimate, schedule, noise, group=group), torch.ones(3, 2))


def test_what_cannot_be_sampled_is_refused():
    noise = torch.zeros(2, 2)

    def silent(xt, t, group, cond):
        return ReverseEstimate(xt)

    with pytest.raises(ValueError, match="got 'learned': train one of twice the channels"):
        AncestralSampler(2).draw(silent, table(), noise)
    with pytest.raises(ValueError, match="`schedule` must be a table of timesteps"):
        AncestralSampler(2, "beta").draw(silent, VP(), noise)
    with pytest.raises(ValueError, match="`variance` must be 'learned', 'beta' or 'beta_tilde'"):
        AncestralSampler(2, "fixed")
    with pytest.raises(ValueError, match="`steps` must be at least 2"):
        AncestralSampler(1)
