import pytest
import torch

from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import EDM, VP, Cosine, RectifiedFlow


def times(schedule, count=9):
    u = torch.linspace(0.01, 0.99, count, dtype=torch.float64)
    return schedule.t_min + (schedule.t_max - schedule.t_min) * u


def drawn(schedule, t, source):
    """(x0, noise, xt), each (B, 2, 3)."""
    x0, noise = torch.randn(2, len(t), 2, 3, generator=source, dtype=torch.float64).unbind()
    return x0, noise, schedule.perturb(x0, noise, t)


def published_output(kind, schedule, t, x0, noise, sigma_data=0.5):
    """What the network predicts, as its source states it."""
    column = t[:, None, None]
    alpha, sigma = schedule.alpha(column), schedule.sigma(column)
    xt = alpha * x0 + sigma * noise
    if kind == "x0":
        return x0
    if kind == "epsilon":
        return noise
    if kind == "v":
        return alpha * noise - sigma * x0
    if kind == "score":
        return -(xt - alpha * x0) / sigma**2
    if kind == "velocity":
        return schedule.alpha_derivative(column) * x0 + schedule.sigma_derivative(column) * noise
    z, s = xt / alpha, sigma / alpha
    skip = sigma_data**2 / (s**2 + sigma_data**2)
    return (x0 - skip * z) * (s**2 + sigma_data**2).sqrt() / (s * sigma_data)


def test_the_output_of_a_draw_is_what_the_literature_states(kind, schedule, source):
    t = times(schedule)
    x0, noise, _ = drawn(schedule, t, source)
    output = prediction(kind, schedule, t).output(x0, noise, x0)
    torch.testing.assert_close(output, published_output(kind, schedule, t, x0, noise))


def test_the_output_of_a_draw_maps_back_to_the_sample(kind, schedule, source):
    t = times(schedule)
    x0, noise, xt = drawn(schedule, t, source)
    coefficients = prediction(kind, schedule, t)
    again = coefficients.x0_hat(xt, coefficients.output(x0, noise, x0))
    torch.testing.assert_close(again, x0, rtol=1e-9, atol=1e-9)


def test_the_output_for_a_target_maps_to_that_target(kind, schedule, source):
    t = times(schedule)
    x0, noise, xt = drawn(schedule, t, source)
    target = torch.randn(x0.shape, generator=source, dtype=x0.dtype)
    coefficients = prediction(kind, schedule, t)
    mapped = coefficients.x0_hat(xt, coefficients.output(x0, noise, target))
    torch.testing.assert_close(mapped, target, rtol=1e-9, atol=1e-9)


def test_b_is_the_derivative_of_x0_hat_by_the_output(kind, schedule):
    t = times(schedule)
    coefficients = prediction(kind, schedule, t)
    xt, output = torch.ones(2, len(t), 1, dtype=torch.float64).unbind()
    slope = coefficients.x0_hat(xt, output + 1) - coefficients.x0_hat(xt, output)
    torch.testing.assert_close(slope[:, 0], coefficients.b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [1e-4, 1e-2, 1.0])
def test_at_low_noise_nothing_cancels_in_float32(kind, schedule, level, source):
    t = schedule.time(torch.full((64,), level, dtype=torch.float64)).float()
    x0, noise = torch.randn(2, 64, 32, generator=source).unbind()
    output = prediction(kind, schedule, t).output(x0, noise, x0)

    wide = t.double(), x0.double(), noise.double()
    expected = prediction(kind, schedule, wide[0]).output(wide[1], wide[2], wide[1])
    error = (output - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 5e-6


def test_edm_is_the_published_preconditioning():
    t = torch.logspace(-3, 2, 21, dtype=torch.float64)
    sigma_data = 0.7
    coefficients = prediction("edm", EDM(), t, sigma_data)
    variance = t**2 + sigma_data**2
    torch.testing.assert_close(coefficients.a, sigma_data**2 / variance)
    torch.testing.assert_close(coefficients.b, t * sigma_data / variance.sqrt())
    torch.testing.assert_close(coefficients.input_scale, 1 / variance.sqrt())


def test_edm_has_unit_inputs_and_outputs_at_every_noise_level(schedule, source):
    t = times(schedule, 5).repeat_interleave(100_000)
    x0 = 0.5 * torch.randn(len(t), 1, generator=source, dtype=torch.float64)
    noise = torch.randn(len(t), 1, generator=source, dtype=torch.float64)
    coefficients = prediction("edm", schedule, t, sigma_data=0.5)
    inputs = coefficients.input_scale[:, None] * schedule.perturb(x0, noise, t)
    outputs = coefficients.output(x0, noise, x0)
    for x in (inputs, outputs):
        stds = x.reshape(5, -1).std(dim=1)
        torch.testing.assert_close(stds, torch.ones_like(stds), rtol=0.01, atol=0)


@pytest.mark.parametrize("schedule", [VP(), Cosine()], ids=["VP", "Cosine"])
def test_v_of_a_variance_preserving_process_is_an_angle(schedule):
    t = times(schedule)
    coefficients = prediction("v", schedule, t)
    torch.testing.assert_close(coefficients.a, schedule.alpha(t))
    torch.testing.assert_close(coefficients.b, -schedule.sigma(t))


def test_only_edm_scales_the_input(kind):
    scale = prediction(kind, RectifiedFlow(), torch.tensor([0.5])).input_scale
    assert (float(scale) != 1) == (kind == "edm")


@pytest.mark.parametrize("kind", ["x0", "v", "velocity", "edm"])
def test_where_the_signal_vanishes_x0_hat_is_finite(kind, source):
    t = torch.ones(8)
    x0, noise = torch.randn(2, 8, 3, generator=source).unbind()
    coefficients = prediction(kind, RectifiedFlow(), t)
    again = coefficients.x0_hat(noise, coefficients.output(x0, noise, x0))
    torch.testing.assert_close(again, x0)


def test_an_unknown_prediction_raises_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"`prediction` must be 'x0', 'epsilon', 'v', .* or 'edm', got 'eps'"
    ):
        prediction("eps", EDM(), torch.ones(1))
