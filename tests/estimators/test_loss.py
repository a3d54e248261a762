import pytest
import torch
from torch import nn

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean, TargetEstimate
from lightning_vr.estimators.draws import noise_samples
from lightning_vr.estimators.loss import ControlVariate, diffusion_loss, network_output
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import VE, VP
from lightning_vr.process.weightings import EDMWeighting, UnitWeighting


def problem(count=6, shape=(3,), dtype=torch.float32, schedule=None):
    source = generator("loss problem")
    schedule = schedule or VP()
    x0 = torch.randn(count, *shape, generator=source, dtype=dtype)
    t = torch.linspace(0.1, 0.9, count, dtype=dtype)
    weight = torch.linspace(0.5, 2.0, count, dtype=dtype)
    noised = noise_samples(Clean(x0), schedule, t, weight, source)
    target = torch.randn(count, *shape, generator=source, dtype=dtype)
    return noised, TargetEstimate(target, torch.ones_like(t), torch.zeros_like(t))


def estimate(
    network, noised, target, schedule=None, weighting=None, control_variate=None, **options
):
    schedule, weighting = schedule or VP(), weighting or EDMWeighting()
    objective = Objective(schedule, schedule.default_timesteps(), weighting, **options)
    return diffusion_loss(
        network, noised, target, objective=objective, control_variate=control_variate
    )


def test_the_gradient_is_that_of_the_weighted_squared_error_in_x0_space(kind):
    noised, target = problem(dtype=torch.float64)
    schedule, weighting = VP(), EDMWeighting()
    linear = nn.Linear(3, 3, dtype=torch.float64)
    parameters = list(linear.parameters())
    loss = estimate(lambda x, _: linear(x), noised, target, prediction=kind).loss

    coefficients = prediction(kind, schedule, noised.t)
    output = linear(coefficients.input_scale[:, None] * noised.xt)
    x0_hat = coefficients.a[:, None] * noised.xt + coefficients.b[:, None] * output
    weights = noised.weight * weighting(schedule, noised.t)
    plain = (weights * ((x0_hat - target.x0) ** 2).mean(1)).mean()

    for found, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_mean_of_the_draws_and_does_not_grow_with_the_resolution():
    small, large = problem(256, (1, 4, 4)), problem(256, (1, 16, 16))
    losses = []
    for noised, target in (small, large):
        found = estimate(lambda x, _: torch.zeros_like(x), noised, target)
        torch.testing.assert_close(found.loss, found.per_draw.mean())
        assert found.per_draw.shape == (256,)
        losses.append(float(found.loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_network_is_called_once_with_scaled_samples_and_the_draws():
    noised, target = problem()
    calls = []

    def network(x, given):
        calls.append((x, given))
        return x

    estimate(network, noised, target, prediction="edm", sigma_data=0.3)
    [(x, given)] = calls
    norm = (noised.sigma**2 + (0.3 * noised.alpha) ** 2).sqrt()
    torch.testing.assert_close(x, noised.xt / norm[:, None])
    assert given is noised


def test_a_half_precision_output_is_compared_in_float32():
    noised, target = problem()
    output = torch.randn(6, 3, generator=generator(0)).bfloat16()
    found = estimate(lambda *_: output, noised, target)
    wide = estimate(lambda *_: output.float(), noised, target)
    assert found.per_draw.dtype == torch.float32
    assert torch.equal(found.per_draw, wide.per_draw)


@pytest.mark.parametrize("level", [1e-4, 1e-3])
def test_at_low_noise_the_loss_of_a_near_perfect_network_keeps_its_digits(kind, level):
    """A network off by 1 % of its output, where x0_hat and the target agree to four digits."""
    schedule = VE(1e-5, 50.0)
    source = generator("low noise")
    t = schedule.time(torch.full((8,), level, dtype=torch.float64)).float()
    x0 = torch.randn(8, 64, generator=source)
    noised = noise_samples(Clean(x0), schedule, t, torch.ones(8), source)
    target = TargetEstimate(x0, torch.ones(8), torch.zeros(8))
    wanted = prediction(kind, schedule, t.double()).output(
        x0.double(), noised.noise.double(), x0.double()
    )
    off = 1.01 * wanted
    weighting = UnitWeighting(kind)

    found = estimate(lambda *_: off.float(), noised, target, schedule, weighting, prediction=kind)
    exact = (off - wanted).square().mean(1)
    torch.testing.assert_close(found.per_draw.double(), exact, rtol=2e-3, atol=0)


class Doubled(ControlVariate):
    """Sees what the loss sees, and adds a term for each draw."""

    def forward(self, network, noised, target, objective):
        output = network_output(network, noised, objective)
        return output, output.sum(1) + target.ess


def test_a_control_variate_is_added_to_each_draw():
    noised, target = problem()
    linear = nn.Linear(3, 3)
    seen = []

    def network(x, _):
        seen.append(linear(x))
        return seen[-1]

    plain = estimate(network, noised, target)
    found = estimate(network, noised, target, control_variate=Doubled())
    assert len(seen) == 2
    torch.testing.assert_close(found.per_draw, plain.per_draw)
    torch.testing.assert_close(found.control, seen[0].sum(1) + 1)
    torch.testing.assert_close(found.loss, (plain.per_draw + seen[0].sum(1) + 1).mean())


def test_without_gradients_the_control_variate_is_left_out():
    noised, target = problem()
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        found = estimate(lambda x, _: linear(x), noised, target, control_variate=Doubled())
    assert found.control is None
    torch.testing.assert_close(found.loss, found.per_draw.mean())
