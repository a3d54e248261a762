import diffusers
import pytest
import torch

from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import VP

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
    usual = DiffusersSchedule(flow).default_timesteps()(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(usual, torch.tensor([1.0, 999.0]))


@pytest.mark.parametrize("shift", [0.5, 3.0, 12.0])
def test_a_flow_is_trained_where_its_scheduler_has_timesteps(shift):
    u = (torch.arange(1000, dtype=torch.float64).flip(0) + 0.5) / 1000
    schedulers = [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift),
    ]
    own = schedulers[0].timesteps.double()
    for scheduler in schedulers:
        found = DiffusersSchedule(scheduler).default_timesteps()(u)
        # the scheduler has them at the upper end of each step, also above the largest time
        assert float((found - own).abs().max()) < 3 * max(shift, 1 / shift)
        assert float((found / 1000).median()) == pytest.approx(shift / (1 + shift), abs=5e-3)


def test_a_shift_by_the_size_of_the_picture_needs_a_density_of_the_user():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"`timesteps` must be given .* Shifted\(Uniform\(0.001"):
        DiffusersSchedule(scheduler).default_timesteps()


def test_a_shift_that_its_configuration_does_not_hold_is_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(5.0)
    with pytest.raises(ValueError, match=r"`shift` .* built with, 3.0, got 5.0 .*shift=5.0"):
        DiffusersSchedule(scheduler).default_timesteps()


@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_a_scheduler_that_has_sampled_is_the_same_process(name):
    flow = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")(shift=3.0)
    expected = DiffusersSchedule(flow).alpha(STEPS[1:].float())
    flow.set_timesteps(4)
    flow.set_begin_index(2)
    flow.step(torch.zeros(1, 1), flow.timesteps[2], torch.zeros(1, 1))
    at = flow.step_index
    assert torch.equal(DiffusersSchedule(flow).alpha(STEPS[1:].float()), expected)
    assert flow.step_index == at


def test_a_class_derived_from_a_scheduler_is_what_it_does():
    class Derived(diffusers.FlowMatchEulerDiscreteScheduler):
        def __init__(self, count):
            super().__init__(num_train_timesteps=count)

    class FromNoise(Derived):
        def scale_noise(self, sample, timestep, noise):
            return super().scale_noise(noise, timestep, sample)

    assert DiffusersSchedule(Derived(50)).steps == 50
    with pytest.raises(ValueError, match="got FromNoise: use"):
        DiffusersSchedule(FromNoise(50))


def test_a_prediction_type_without_a_name_here_is_refused():
    with pytest.raises(ValueError, match=r"`prediction_type` .* epsilon, sample, .* got 'noise'"):
        DiffusersSchedule(diffusers.DDPMScheduler(prediction_type="noise"))


@pytest.mark.parametrize("wrong", [VP(), diffusers.DDPMScheduler, "DDPMScheduler", None])
def test_what_is_no_scheduler_is_refused_with_the_fix(wrong):
    with pytest.raises(ValueError, match=r"`scheduler` must be a .* got .*use one, as DDPMSch"):
        DiffusersSchedule(wrong)


def test_log_sigma_as_the_networks_time_is_refused():
    settings = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match=r"must give the network timesteps, .* use EDM"):
        DiffusersSchedule(diffusers.EulerDiscreteScheduler(**settings))


def test_inverted_sigmas_are_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match=r"noise at its last timestep, .*set `invert_sigmas` to F"):
        DiffusersSchedule(scheduler)


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
