"""Every scheduler class of diffusers, under many settings: its own noise, or a refusal in words."""

import inspect

import numpy
import pytest
import torch
from support.schedulers import CLASSES, REQUIRED

from lightning_vr.process.diffusers_schedule import DiffusersSchedule

STEPS = 30

pytestmark = [
    # diffusers turns tensors into arrays as numpy 2 no longer likes
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # and takes the logarithm of a first sigma of 0
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:diffusers"),
]


# what each class is, so that a new class of diffusers asks for a line
FLOWS = {
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
MULTISTEP = {  # tables, and flows with `use_flow_sigmas`
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
TABLES = MULTISTEP | {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
}
REFUSED = {
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "CMStochasticIterativeScheduler",
    "ConsistencyDecoderScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDPMWuerstchenScheduler",
    "DiscreteDDIMScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EntropyBoundScheduler",
    "HeliosDMDScheduler",
    "HeliosScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "PiflowScheduler",
    "RFD4ProteinaScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "VQDiffusionScheduler",
}
BETAS = [
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "laplace"},
    {"beta_schedule": "exp"},
    {"beta_start": 1e-3, "beta_end": 0.5},
    {"snr_shift_scale": 1.0},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
]
SAMPLING = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"use_dynamic_shifting": True},
    {"thresholding": True},
    {"shift": 3.0},
    {"final_sigmas_type": "sigma_min"},
]


def parameters(kind):
    return inspect.signature(kind).parameters.keys()


def build(kind, **settings):
    """A scheduler of few steps, or None where it does not know the settings."""
    settings = REQUIRED.get(kind.__name__, {}) | settings
    if "num_train_timesteps" in parameters(kind):
        settings = {"num_train_timesteps": STEPS} | settings
    if not settings.keys() <= parameters(kind):
        return None
    try:
        return kind(**settings)
    except (NotImplementedError, ValueError):
        return None


def built(kind, variants):
    """The settings and the scheduler of each variant that the class knows."""
    pairs = ((settings, build(kind, **settings)) for settings in variants)
    return [(settings, scheduler) for settings, scheduler in pairs if scheduler is not None]


def with_table(scheduler):
    """alpha and sigma at the timesteps of a table, as written in each of diffusers' papers."""
    kept = torch.cumprod(1 - scheduler.betas.double(), 0)
    if "snr_shift_scale" in scheduler.config:
        scale = scheduler.config.snr_shift_scale
        kept = kept / (scale + (1 - scale) * kept)
    return kept.sqrt(), (1 - kept).sqrt()


def own_noise(scheduler):
    """The timesteps of a scheduler, and alpha and sigma that its own `add_noise` noises with."""
    t = torch.arange(STEPS)
    if hasattr(scheduler, "sigmas") and "Solver" not in type(scheduler).__name__:
        scheduler.set_timesteps(STEPS)
        t = scheduler.timesteps.unique()
        t = t[t == t.round()]
    one, zero = torch.ones(len(t), 1), torch.zeros(len(t), 1)
    alpha = scheduler.add_noise(one, zero, t)[:, 0].double()
    sigma = scheduler.add_noise(zero, one, t)[:, 0].double()
    return t.double(), alpha, sigma


def test_each_class_of_diffusers_is_known_to_this_test():
    assert CLASSES.keys() <= FLOWS | TABLES | REFUSED
    assert len(CLASSES) > 40


@pytest.mark.parametrize("name", sorted(CLASSES.keys() & REFUSED))
def test_a_class_of_another_process_is_refused_in_words(name):
    variants = [{}, {"shift": 3.0}, {"prediction_type": "v_prediction"}]
    schedulers = built(CLASSES[name], variants)
    assert schedulers
    for _, scheduler in schedulers:
        with pytest.raises(ValueError, match=rf"^`scheduler` must .* got {name}.*: use "):
            DiffusersSchedule(scheduler)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() & TABLES))
def test_alpha_and_sigma_are_those_of_the_betas_whatever_is_set_for_sampling(name):
    for settings, scheduler in built(CLASSES[name], [{}, *BETAS, *SAMPLING]):
        schedule, t = DiffusersSchedule(scheduler), torch.arange(STEPS).double()
        assert (schedule.t_min, schedule.t_max) == (0, STEPS - 1), settings
        alpha, sigma = with_table(scheduler)
        torch.testing.assert_close(schedule.alpha(t), alpha, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(schedule.sigma(t), sigma, rtol=1e-5, atol=5e-6)
        assert schedule.default_timesteps().steps == STEPS


# before they sample, multistep schedulers pair sigmas with other timesteps; two add no noise at all
NO_NOISE = {*MULTISTEP, "DDIMInverseScheduler", "RePaintScheduler"} - {"SASolverScheduler"}


@pytest.mark.parametrize("name", sorted((CLASSES.keys() & TABLES) - NO_NOISE))
def test_the_network_gets_what_the_schedulers_own_add_noise_makes(name):
    for settings, scheduler in built(CLASSES[name], [{}, *BETAS]):
        schedule = DiffusersSchedule(scheduler)
        t, alpha, sigma = own_noise(scheduler)
        assert len(t) >= STEPS - 1, settings
        # Euler schedulers keep x_t / alpha, which they scale before the network sees it
        scale = torch.sqrt(alpha**2 + sigma**2)
        torch.testing.assert_close(schedule.alpha(t), alpha / scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(schedule.sigma(t), sigma / scale, rtol=1e-4, atol=1e-5)


# the inverse one pairs sigmas with the timesteps of others
@pytest.mark.parametrize("name", sorted(MULTISTEP - {"DPMSolverMultistepInverseScheduler"}))
def test_multistep_schedulers_step_through_the_same_noise_levels(name):
    for settings in ({}, {"beta_schedule": "scaled_linear"}, {"use_karras_sigmas": True}):
        scheduler = CLASSES[name](num_train_timesteps=1000, **settings)
        schedule = DiffusersSchedule(scheduler)
        scheduler.set_timesteps(20)
        sigmas, t = scheduler.sigmas.double()[: len(scheduler.timesteps)], scheduler.timesteps
        # timesteps between two steps are rounded
        torch.testing.assert_close(schedule.time(sigmas), t.double(), rtol=0, atol=0.51)


@pytest.mark.parametrize("name", sorted(FLOWS))
def test_a_flow_is_the_schedulers_own_scale_noise(name):
    variants = [{}, *({k: v} for each in SAMPLING for k, v in each.items())]
    for settings, scheduler in built(CLASSES[name], variants):
        schedule, kind = DiffusersSchedule(scheduler), type(scheduler)
        one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        for t in scheduler.timesteps.float().split(1):
            fresh = [kind.from_config(scheduler.config) for _ in range(2)]
            torch.testing.assert_close(schedule.alpha(t), fresh[0].scale_noise(one, t, zero)[0])
            torch.testing.assert_close(schedule.sigma(t), fresh[1].scale_noise(zero, t, one)[0])
        assert (schedule.steps, schedule.prediction) == (STEPS, "velocity"), settings


@pytest.mark.parametrize("name", sorted(MULTISTEP))
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_multistep_scheduler_with_flow_sigmas_is_a_flow(name, shift):
    settings = {"use_flow_sigmas": True, "flow_shift": shift}
    scheduler = CLASSES[name](prediction_type="flow_prediction", **settings)
    schedule = DiffusersSchedule(scheduler)
    assert (schedule.is_flow, schedule.prediction) == (True, "velocity")
    assert (schedule.t_min, schedule.t_max) == (1, 999)
    scheduler.set_timesteps(10)
    sigma = scheduler.sigmas[:-1].double() if "Inverse" not in name else scheduler.sigmas[1:]
    t = 1000 * sigma
    own = [scheduler._sigma_to_alpha_sigma_t(each) for each in sigma]
    torch.testing.assert_close(schedule.alpha(t), torch.stack([alpha for alpha, _ in own]))
    torch.testing.assert_close(schedule.sigma(t), torch.stack([sigma for _, sigma in own]))


@pytest.mark.parametrize("name", sorted(CLASSES.keys() & TABLES))
def test_a_table_that_keeps_all_signal_or_none_is_refused(name):
    wrong = [
        ({"beta_start": 0.0}, r"noise at its first timestep, got .* of 1: set its `beta_start`"),
        ({"rescale_betas_zero_snr": True}, "some signal at its last .* `rescale_betas_zero_snr`"),
        ({"num_train_timesteps": 1}, "two or more timesteps"),
        ({"trained_betas": numpy.array([0.1, 0.0, 0.1])}, "adds none at 1, as its beta there is 0"),
        ({"trained_betas": numpy.array([0.1, 1.0, 0.1])}, "some signal at its last timestep"),
        ({"trained_betas": numpy.array([0.1, numpy.nan, 0.1])}, "finite betas"),
    ]
    for settings, message in wrong:
        try:
            scheduler = build(CLASSES[name], **settings)
        except IndexError:  # a scheduler that does not know so few steps itself
            continue
        if scheduler is not None:
            with pytest.raises(ValueError, match=f"^`scheduler` must .*{message}"):
                DiffusersSchedule(scheduler)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() & TABLES))
@pytest.mark.parametrize("length", [7, 50])
def test_trained_betas_of_another_length_are_the_whole_table(name, length):
    betas = numpy.linspace(1e-3, 0.2, length)
    try:
        scheduler = build(CLASSES[name], trained_betas=betas)
    except IndexError:  # one that asks for its steps at once
        scheduler = None
    if scheduler is None:
        return
    schedule = DiffusersSchedule(scheduler)
    expected = numpy.cumprod(1 - betas)
    if "CogVideoX" in name:
        expected = expected / (3 - 2 * expected)
    t = torch.arange(length).double()
    assert schedule.t_max == length - 1
    torch.testing.assert_close(
        schedule.alpha(t) ** 2, torch.from_numpy(expected), rtol=1e-5, atol=0
    )
    assert schedule.default_timesteps().steps == length
