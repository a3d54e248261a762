import math
from typing import get_args

import pytest
import torch

from lightning_vr.core.types import Noised, TargetEstimate
from lightning_vr.estimators.loss import denoise, diffusion_loss
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import PredictionType, prediction
from lightning_vr.process.schedules import VP, KnownScales, expand
from lightning_vr.process.weightings import (
    EDMWeighting,
    LogNormalWeighting,
    MinSNRWeighting,
    UnitWeighting,
)

KINDS = get_args(PredictionType)
WEIGHTINGS = [
    EDMWeighting(),
    MinSNRWeighting(),
    LogNormalWeighting(),
    *(UnitWeighting(kind) for kind in KINDS),
]
every_weighting = pytest.mark.parametrize(
    "weighting", WEIGHTINGS, ids=lambda w: type(w).__name__ + getattr(w, "prediction", "")
)


def draws(schedule, dtype=torch.float64, count=64):
    source = torch.Generator().manual_seed(0)
    u = torch.linspace(0.01, 0.99, count, dtype=dtype)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * u
    x0, noise, target = torch.randn(3, count, 6, generator=source, dtype=dtype).unbind()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    xt = schedule.perturb(x0, noise, t)
    noised = Noised(xt, x0, noise, t, alpha, sigma, torch.linspace(0.5, 2, count, dtype=dtype))
    ones = torch.ones_like(t)
    return noised, TargetEstimate(target, ones, ones)


def network_that_denoises_to(x0_hat, kind, schedule):
    """A raw network of the given kind whose x0_hat is the same whatever the kind."""

    def network(_, noised):
        coefficients = prediction(kind, schedule, noised.t)
        skipped = expand(coefficients.a, x0_hat) * noised.xt
        return (x0_hat - skipped) / expand(coefficients.b, x0_hat)

    return network


@every_weighting
def test_one_weight_is_one_loss_whatever_the_network_predicts(weighting, schedule, kind):
    noised, target = draws(schedule)
    x0_hat = torch.tanh(noised.xt)
    network = network_that_denoises_to(x0_hat, kind, schedule)
    objective = Objective(schedule, schedule.default_timesteps(), weighting, kind)
    estimate = diffusion_loss(network, noised, target, objective=objective)
    plain = noised.weight * weighting(schedule, noised.t) * (x0_hat - target.x0).square().mean(1)
    torch.testing.assert_close(estimate.per_draw, plain, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(estimate.loss, plain.mean(), rtol=1e-6, atol=0)


@every_weighting
def test_a_weight_is_that_of_the_scales_that_are_known(weighting, schedule, kind):
    objective = Objective(schedule, schedule.default_timesteps(), weighting, kind)
    t = draws(schedule)[0].t
    expected = objective.weight(t)
    assert torch.equal(objective.weight(t, schedule.scales(t)), expected)
    if "velocity" not in (kind, getattr(weighting, "prediction", "")):  # by derivatives in time
        found = objective.weight(t, schedule.scales(t.flip(0)))
        torch.testing.assert_close(found.flip(0), expected)


def test_what_is_not_known_is_asked_of_the_schedule(schedule):
    t, other = draws(schedule)[0].t.split(32)
    known = KnownScales(schedule, t, (2 * torch.ones_like(t), torch.ones_like(t)))
    assert known.noise_level(t).unique().tolist() == [0.5]
    assert torch.equal(known.noise_level(other), schedule.noise_level(other))
    for found, expected in zip(known.scales(other), schedule.scales(other), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(known.alpha(other), schedule.alpha(other))
    assert torch.equal(known.sigma_derivative(t), schedule.sigma_derivative(t))


def test_denoise_is_the_affine_map_of_the_raw_network(schedule, kind):
    noised, _ = draws(schedule)
    x0_hat = torch.tanh(noised.xt)
    network = network_that_denoises_to(x0_hat, kind, schedule)
    objective = Objective(schedule, schedule.default_timesteps(), EDMWeighting(), kind)
    torch.testing.assert_close(denoise(network, noised, objective), x0_hat)


def test_unit_weight_is_the_mean_squared_error_of_the_raw_output(schedule, kind):
    noised, target = draws(schedule)
    target = TargetEstimate(noised.x0, target.ess, target.spread)
    estimate = diffusion_loss(
        lambda x, _: torch.sin(x),
        noised,
        target,
        objective=Objective(schedule, schedule.default_timesteps(), UnitWeighting(kind), kind),
    )
    coefficients = prediction(kind, schedule, noised.t)
    output = torch.sin(expand(coefficients.input_scale, noised.xt) * noised.xt)
    wanted = coefficients.output(noised.x0, noised.noise, noised.x0)
    plain = noised.weight * (output - wanted).square().mean(1)
    torch.testing.assert_close(estimate.per_draw, plain)


def test_edm_weight_is_unit_weight_on_edms_raw_output(schedule):
    t = draws(schedule)[0].t
    b = prediction("edm", schedule, t, sigma_data=0.3).b
    product = EDMWeighting(sigma_data=0.3)(schedule, t) * b**2
    torch.testing.assert_close(product, torch.ones_like(product))


def test_edm_weight_is_the_published_one(schedule):
    t = draws(schedule)[0].t
    s = schedule.noise_level(t)
    torch.testing.assert_close(EDMWeighting()(schedule, t), (s**2 + 0.25) / (0.5 * s) ** 2)


def test_min_snr_is_the_published_weight_in_epsilon_and_in_v():
    schedule, weighting = VP(), MinSNRWeighting(gamma=5.0)
    t = draws(schedule)[0].t
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    least = torch.minimum(snr, torch.full_like(snr, 5.0))
    for kind, published in (("x0", least), ("epsilon", least / snr), ("v", least / (snr + 1))):
        squared = prediction(kind, schedule, t).b ** 2
        torch.testing.assert_close(weighting(schedule, t) * squared, published)


def test_log_normal_weight_is_a_bell_on_unit_epsilon_weight(schedule):
    t = draws(schedule)[0].t
    log_level = schedule.noise_level(t).log()
    normal = torch.distributions.Normal(*torch.tensor([-1.0, 0.8], dtype=torch.float64))
    expected = normal.log_prob(log_level).exp() * UnitWeighting("epsilon")(schedule, t)
    torch.testing.assert_close(LogNormalWeighting(-1.0, 0.8)(schedule, t), expected)


@every_weighting
def test_weights_are_finite_and_not_negative_over_the_whole_range(weighting, schedule):
    t = torch.linspace(schedule.t_min, schedule.t_max, 1001)
    weight = weighting(schedule, t)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EDMWeighting(0.0), "`sigma_data` must be positive and finite, got 0.0"),
        (lambda: MinSNRWeighting(-1.0), "`gamma` must be positive and finite, got -1.0"),
        (lambda: LogNormalWeighting(std=math.inf), "`std` must .* got inf"),
        (lambda: UnitWeighting("noise"), "`prediction` must be 'x0', .* or 'edm', got 'noise'"),
    ],
)
def test_invalid_weightings_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()
