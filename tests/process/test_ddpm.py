"""Steps of exact reverse processes, against known variances, DDIM and diffusers' scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler
from support.gaussian_reverse import STD, exact, scheduler, table

from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.reverse_steps import ReverseSteps
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import VP
from lightning_vr.process.solvers import DDIM, DDPM
from lightning_vr.process.solvers.row_noise import NoiseKey, RowNoise


def draw(sampler, estimate, schedule, noise, seed=1, **options):
    """Return samples; what the denoiser says is the estimate's x0."""
    return sampler.draw(
        lambda *given: estimate(*given).x0,
        schedule,
        noise,
        reverse=estimate,
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).x0


def test_with_the_exact_variance_few_steps_give_the_variance_of_the_data(source, z_score):
    """The last step returns the mean of x0 given x_0, whose variance is known."""
    schedule, noise = table(1000), torch.randn(20_000, 1, generator=source)
    first = ReverseSteps.of(schedule, 4)
    signal, added = (first.alpha[0] * STD) ** 2, first.sigma[0] ** 2
    expected = float(STD**2 * signal / (signal + added))

    def squares(kind):
        sampler = Sampler(DDPM(kind), steps=4)
        return draw(sampler, exact(schedule, 4), schedule, noise, batch_size=20_000).square()

    assert abs(z_score(squares("learned"), expected)) < 4
    assert z_score(squares("beta_tilde"), expected) < -20


def test_steps_with_a_learned_variance_are_those_of_diffusers_scheduler(monkeypatch):
    """``variance_type="learned_range"`` takes both halves of a network as one output."""
    schedule = table(20)
    options = {"variance_type": "learned_range", "prediction_type": "sample", "clip_sample": False}
    own = DDPMScheduler.from_config(scheduler(20).config, **options)
    x = noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def estimate(xt, t, group=None, cond=None):
        return ReverseEstimate(torch.tanh(xt), torch.sin(3 * xt))

    rows = RowNoise(NoiseKey(torch.Generator().manual_seed(1)), 0, 3)
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: rows.like(noise))
    for t in range(19, -1, -1):
        x = own.step(torch.cat(estimate(x, t), dim=1), t, x).prev_sample
    found = draw(Sampler(DDPM(), steps=20), estimate, schedule, noise)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_with_the_smallest_variance_it_is_ddim_with_all_of_its_noise():
    schedule, noise = table(1000), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(DDPM("beta_tilde"), steps=7)
    levels = sampler.noise_levels(schedule).tolist()

    def estimate(xt, t, group, cond):
        return ReverseEstimate(torch.tanh(xt))

    expected = draw(Sampler(DDIM(eta=1.0), grid=levels), estimate, schedule, noise)
    found = draw(sampler, estimate, schedule, noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sampler.evaluations == 7


def test_guidance_is_of_the_mean_and_the_variance_is_that_of_the_conditional_half():
    schedule, noise, group = table(20), torch.zeros(3, 2), torch.tensor([0, 1, 1])

    def estimate(xt, t, group, cond):
        is_conditional = (group >= 0)[:, None].expand_as(xt)
        x0 = torch.where(is_conditional, 3.0, 1.0)
        return ReverseEstimate(x0, torch.where(is_conditional, -1.0, torch.inf))

    guided, clipped = (
        draw(
            Sampler(DDPM(clip_sample=clips), steps=2, guidance=2.0),
            estimate,
            schedule,
            noise,
            group=group,
        )
        for clips in (False, True)
    )
    assert torch.equal(guided, torch.full((3, 2), 5.0))
    assert torch.equal(clipped, torch.ones(3, 2))


def test_what_cannot_be_sampled_is_refused():
    noise = torch.zeros(2, 2)

    def silent(xt, t, group, cond):
        return ReverseEstimate(xt)

    with pytest.raises(ValueError, match="got 'learned': train one of twice the channels"):
        draw(Sampler(DDPM(), steps=2), silent, table(), noise)
    with pytest.raises(ValueError, match="got 'learned': train one of twice the channels"):
        Sampler(DDPM(), steps=2).draw(lambda xt, *_: xt, table(), noise)
    with pytest.raises(ValueError, match="`schedule` must be a table of timesteps"):
        Sampler(DDPM("beta"), steps=2).noise_levels(VP())
    with pytest.raises(ValueError, match="`steps` must be at most 20"):
        Sampler(DDPM("beta"), steps=21).noise_levels(table())
    with pytest.raises(ValueError, match="`variance` must be 'learned', 'beta' or 'beta_tilde'"):
        DDPM("fixed")
