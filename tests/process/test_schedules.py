import math

import pytest
import torch

from lightning_vr.process.schedules import EDM, VE, VP, Cosine, RectifiedFlow


@pytest.fixture
def t(schedule):
    """Times over the whole range, denser near the data."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64) ** 3
    return schedule.t_min + (schedule.t_max - schedule.t_min) * u


def derivative(function, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum() + 0 * t.sum(), t)[0]


@pytest.mark.parametrize("scale", ["alpha", "sigma"])
def test_derivatives_are_those_of_autograd(schedule, t, scale):
    stated = getattr(schedule, f"{scale}_derivative")(t)
    expected = derivative(getattr(schedule, scale), t)
    torch.testing.assert_close(stated, expected, rtol=1e-8, atol=1e-8)


def test_time_inverts_the_noise_level(schedule, t):
    again = schedule.time(schedule.noise_level(t))
    torch.testing.assert_close(again, t, rtol=1e-9, atol=1e-12)


def test_the_noise_level_rises_with_time(schedule, t):
    level = schedule.noise_level(t)
    assert (level > 0).all()
    assert (level.diff() > 0).all()


def test_float32_agrees_with_float64(schedule, t):
    single = t.float()
    for name in ("alpha", "sigma", "alpha_derivative", "sigma_derivative"):
        scale = getattr(schedule, name)
        torch.testing.assert_close(scale(single), scale(single.double()).float(), rtol=1e-5, atol=0)


def test_dtype_and_shape_are_kept(schedule):
    t = torch.full((2, 3), 0.5, dtype=torch.float32)
    names = ("alpha", "sigma", "alpha_derivative", "sigma_derivative", "noise_level", "time")
    for name in names:
        for x in (t, t.double()):
            value = getattr(schedule, name)(x)
            assert value.shape == x.shape
            assert value.dtype == x.dtype


def test_perturb_scales_each_sample_by_its_own_time(schedule, source):
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=source).unbind()
    t = torch.tensor([0.1, 0.5, 0.9])
    xt = schedule.perturb(x0, noise, t)
    for i in range(3):
        expected = schedule.alpha(t[i]) * x0[i] + schedule.sigma(t[i]) * noise[i]
        torch.testing.assert_close(xt[i], expected)


def test_usual_times_lie_within_the_range(schedule):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    usual = schedule.default_timesteps()(u)
    assert (usual >= schedule.t_min).all()
    assert (usual <= schedule.t_max).all()


def test_vp_integrates_a_linear_beta():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    fine = torch.linspace(0, 1, 2001, dtype=torch.float64)
    beta = 0.1 + fine * (20.0 - 0.1)
    integral = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(beta, fine)])[::200]
    schedule = VP(beta_min=0.1, beta_max=20.0)
    torch.testing.assert_close(schedule.alpha(t), torch.exp(-0.5 * integral))


def test_vp_has_the_noise_level_that_edm_states_for_it():
    t = torch.tensor([1e-5, 0.1, 0.5, 1.0], dtype=torch.float64)
    expected = torch.sqrt(torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t))
    torch.testing.assert_close(VP().noise_level(t), expected)
    assert float(VP().noise_level(t[-1])) == pytest.approx(152, abs=0.5)


@pytest.mark.parametrize("preserving", [VP(), Cosine()])
def test_variance_is_preserved(preserving):
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(
        preserving.alpha(t) ** 2 + preserving.sigma(t) ** 2, torch.ones_like(t)
    )


def test_ve_is_a_geometric_sequence_between_its_ends():
    level = VE(0.02, 100.0).sigma(torch.linspace(0, 1, 6, dtype=torch.float64))
    torch.testing.assert_close(level[[0, -1]], torch.tensor([0.02, 100.0], dtype=torch.float64))
    ratios = level[1:] / level[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(5))


def test_rectified_flow_is_a_straight_line_from_data_to_noise(source):
    x0, noise = torch.randn(2, 5, 3, generator=source).unbind()
    flow, t = RectifiedFlow(), torch.linspace(0, 1, 5)
    torch.testing.assert_close(flow.perturb(x0, noise, t), torch.lerp(x0, noise, t[:, None]))


def test_edm_gives_networks_the_time_in_table_1_or_a_multiple():
    t = torch.tensor([0.002, 1.0, 80.0])
    torch.testing.assert_close(EDM().embedding_time(t), 1000 * torch.log(t) / 4)
    from diffusers import EDMEulerScheduler

    time = EDM(embedding_scale=1.0).embedding_time(t)
    torch.testing.assert_close(time, EDMEulerScheduler().precondition_noise(t))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EDM(sigma_min=0.0), "`sigma_min` and `sigma_max` .* got 0.0 and 80.0"),
        (lambda: VE(sigma_min=1.0, sigma_max=0.5), "0 < sigma_min < sigma_max < inf, got 1.0"),
        (lambda: VP(beta_min=-1.0), "`beta_min` and `beta_max` .* got -1.0 and 20.0"),
        (lambda: Cosine(t_max=1.5), "0 < t_min < t_max <= 1.0, got 0.001 and 1.5"),
        (lambda: RectifiedFlow(t_min=0.0), "`t_min` and `t_max` .* got 0.0 and 0.999"),
        (lambda: EDM(sigma_max=math.nan), "got 0.002 and nan"),
    ],
)
def test_invalid_ranges_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()
