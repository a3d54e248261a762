import diffusers
import pytest
import torch

from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.predictions import prediction

STEPS = torch.arange(1000)


@pytest.fixture(params=["linear", "scaled_linear", "squaredcos_cap_v2"])
def ddpm(request):
    return diffusers.DDPMScheduler(beta_schedule=request.param)


@pytest.fixture(params=[1.0, 3.0], ids=["plain", "shifted"])
def flow(request):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=request.param)


def test_alpha_and_sigma_are_the_schedulers_table(ddpm):
    schedule, t = DiffusersSchedule(ddpm), STEPS.double()
    kept = ddpm.alphas_cumprod.double()
    torch.testing.assert_close(schedule.alpha(t) ** 2, kept, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - kept, rtol=1e-12, atol=0)


def test_perturb_is_the_schedulers_add_noise(ddpm, source):
    x0, noise = torch.randn(2, 1000, 1, 2, 2, generator=source).unbind()
    schedule = DiffusersSchedule(ddpm)
    expected = ddpm.add_noise(x0, noise, STEPS)
    torch.testing.assert_close(schedule.perturb(x0, noise, STEPS.float()), expected)


def test_perturb_is_the_schedulers_scale_noise(flow, source):
    x0, noise = torch.randn(2, 1000, 1, 2, 2, generator=source).unbind()
    expected = flow.scale_noise(x0, flow.timesteps, noise)
    torch.testing.assert_close(DiffusersSchedule(flow).perturb(x0, noise, flow.timesteps), expected)


def test_velocity_of_a_flow_is_noise_minus_sample(flow, source):
    x0, noise = torch.randn(2, 4, 3, generator=source).unbind()
    t = torch.tensor([10.0, 300.0, 700.0, 990.0])
    velocity = prediction("velocity", DiffusersSchedule(flow), t).output(x0, noise, x0)
    torch.testing.assert_close(velocity, noise - x0)


def test_between_two_steps_derivatives_are_those_of_autograd(ddpm):
    schedule, t = DiffusersSchedule(ddpm), (STEPS[:-1].double() + 0.3).requires_grad_()
    for name in ("alpha", "sigma"):
        (slope,) = torch.autograd.grad(getattr(schedule, name)(t).sum(), t)
        stated = getattr(schedule, f"{name}_derivative")(t)
        torch.testing.assert_close(stated.detach(), slope, rtol=1e-8, atol=1e-12)


def test_between_two_steps_the_log_noise_level_is_linear(ddpm):
    schedule = DiffusersSchedule(ddpm)
    level = schedule.noise_level(torch.tensor([400.0, 400.25, 401.0], dtype=torch.float64)).log()
    torch.testing.assert_close(level[1], 0.75 * level[0] + 0.25 * level[2])


@pytest.mark.parametrize(
    "scheduler", [diffusers.DDPMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()]
)
def test_time_inverts_the_noise_level(scheduler):
    schedule = DiffusersSchedule(scheduler)
    t = torch.linspace(schedule.t_min, schedule.t_max, 777, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.noise_level(t)), t, rtol=1e-8, atol=1e-8)


def test_a_table_is_trained_at_its_own_steps_and_a_flow_at_all_times(ddpm, flow):
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    assert torch.equal(DiffusersSchedule(ddpm).default_timesteps()(u), STEPS.double())
    usual = DiffusersSchedule(flow).default_timesteps()(u)
    assert 0 < usual.min() < 2
    assert 998 < usual.max() < 1000


def test_the_network_gets_the_schedulers_own_timestep(ddpm):
    t = STEPS.float()
    assert torch.equal(DiffusersSchedule(ddpm).embedding_time(t), t)


def test_zero_terminal_signal_raises():
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(
        ValueError, match=r"`scheduler` must keep some signal at .* got .*rescale_beta"
    ):
        DiffusersSchedule(scheduler)
    scheduler = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(
        ValueError, match=r"`scheduler` must keep some signal at .* got .*rescale_beta"
    ):
        DiffusersSchedule(scheduler)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_schedulers_raise_with_what_to_use_instead(name):
    with pytest.raises(ValueError, match=rf"got {name}: use EDM\(\) or VE\(\) instead"):
        DiffusersSchedule(getattr(diffusers, name)())
