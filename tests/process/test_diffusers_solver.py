"""Schedulers of diffusers as solvers: their own loops, the exact denoiser, and what is refused."""

import diffusers
import pytest
import torch
from support.denoisers import gaussian_denoiser
from support.schedulers import CLASSES, REQUIRED
from torch import nn

from lightning_vr.core.rng import generator
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.diffusers_solver import DiffusersSolver
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VE, VP, RectifiedFlow
from lightning_vr.process.solvers.row_noise import NoiseKey, RowNoise
from lightning_vr.training.diffusion import Diffusion

pytestmark = [
    # diffusers turns tensors into arrays as numpy 2 no longer likes, and refers to what it renamed
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "DDPM": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "DDPM, clipped": (diffusers.DDPMScheduler, {}),
    "DDIM of v": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "DPM++": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "DPM++ of x0": (diffusers.DPMSolverMultistepScheduler, {"prediction_type": "sample"}),
    "SDE-DPM++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++, flow": (diffusers.DPMSolverMultistepScheduler, FLOW | {"flow_shift": 3.0}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler of v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "flow, Euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "flow, Heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
    "EDM": (diffusers.EDMEulerScheduler, {"sigma_data": 0.6}),
    "EDM, DPM++": (diffusers.EDMDPMSolverMultistepScheduler, {}),
}
FIRST_ORDER = {"DDPM", "DDPM, clipped", "DDIM of v", "Euler", "Euler of v", "Euler ancestral"}
FIRST_ORDER |= {"EDM", "flow, Euler"}


class Curved(nn.Module):
    """Any smooth function of x and t."""

    def forward(self, x, t):
        return torch.tanh(x) + 0.1 * torch.sin(3 * x.flip(1) + t[:, None] / 300)


def build(label):
    kind, settings = SCHEDULERS[label]
    return kind(**settings)


def schedule_of(scheduler):
    return EDM() if "EDM" in type(scheduler).__name__ else DiffusersSchedule(scheduler)


@pytest.mark.parametrize("label", SCHEDULERS)
def test_samples_are_those_of_the_schedulers_own_loop_with_the_raw_network(label):
    scheduler, network, steps = build(label), Curved(), 6
    is_edm = label.startswith("EDM")
    model = Diffusion(
        network,
        schedule=EDM() if is_edm else scheduler,
        prediction="edm" if is_edm else DiffusersSchedule(scheduler).prediction,
        sigma_data=scheduler.config.get("sigma_data", 0.5),
        sampler=Sampler(DiffusersSolver(scheduler), steps),
    )
    noise = torch.randn(3, 2, generator=generator("noise"))
    found = model.sampler.draw(model.denoise, model.schedule, noise, generator=generator("more"))

    options = {}
    if "generator" in scheduler.step.__code__.co_varnames:
        rows = RowNoise(NoiseKey(generator("more")), 0, 3).generators(noise.device)
        options["generator"] = list(rows)
    scheduler.set_timesteps(steps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = (
            scheduler.scale_model_input(x, t)
            if hasattr(scheduler, "sigmas") and hasattr(scheduler, "scale_model_input")
            else x
        )
        time = 1000 * t if is_edm else t  # c_noise of the preconditioning, in thousands
        output = network(scaled, time.float().expand(3))
        x = scheduler.step(output, t, x, **options).prev_sample
    torch.testing.assert_close(found.x0, x, rtol=1e-4, atol=1e-4)
    assert found.evaluations == len(scheduler.timesteps) == model.sampler.evaluations


@pytest.mark.parametrize("label", SCHEDULERS)
def test_samples_of_gaussian_data_have_its_standard_deviation(label):
    scheduler, std = build(label), 0.25  # clipping to [-1, 1] changes nothing
    schedule = schedule_of(scheduler)
    noise = torch.randn(200, 1, 4, 4, generator=generator("gaussian"))
    sampler = Sampler(DiffusersSolver(scheduler), steps=60)
    denoiser = gaussian_denoiser(schedule, std)
    found = sampler.solve(denoiser, schedule, noise, generator=generator("more"))
    # three standard errors, and what methods of first order and diffusers' last steps leave
    bias = 0.18 if label in FIRST_ORDER else 0.03
    assert float(found.std()) == pytest.approx(std, rel=3 / (2 * noise.numel()) ** 0.5 + bias)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_class_of_diffusers_samples_and_counts_or_is_refused_in_words(name):
    scheduler = CLASSES[name](**REQUIRED.get(name, {}))
    try:
        solver = DiffusersSolver(scheduler)
    except ValueError as error:
        assert str(error).startswith("`scheduler` must ")  # noqa: PT017
        assert "use " in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return
    schedule, sampler = schedule_of(scheduler), Sampler(solver, steps=5)
    denoiser = gaussian_denoiser(schedule, 0.5)
    found = sampler.draw(
        lambda xt, t, group, cond: denoiser(xt, t),
        schedule,
        torch.ones(2, 1, 2, 2),
        generator=generator(0),
    )
    assert found.x0.isfinite().all()
    assert found.evaluations == sampler.evaluations >= 5


@pytest.mark.parametrize("label", ["DDPM", "Euler ancestral", "SDE-DPM++"])
def test_stochastic_schedulers_draw_the_same_for_any_batch_size(label):
    scheduler = build(label)
    schedule, sampler = schedule_of(scheduler), Sampler(DiffusersSolver(scheduler), steps=4)
    denoiser = gaussian_denoiser(schedule, 0.5)
    noise = torch.randn(5, 3, generator=generator("noise"))

    def draw(seed, batch_size):
        return sampler.draw(
            lambda xt, t, group, cond: denoiser(xt, t),
            schedule,
            noise,
            generator=generator(seed),
            batch_size=batch_size,
        ).x0

    torch.testing.assert_close(draw("a", 2), draw("a", 5))
    assert not torch.allclose(draw("b", 5), draw("a", 5))


def test_a_flow_scheduler_samples_rectified_flow_and_an_edm_one_any_that_keeps_the_signal():
    noise = torch.randn(4, 3, generator=generator("noise"))
    flow = Sampler(DiffusersSolver(diffusers.FlowMatchEulerDiscreteScheduler()), steps=5)
    edm = Sampler(DiffusersSolver(diffusers.EDMEulerScheduler(sigma_min=0.02, sigma_max=40.0)), 5)
    own = DiffusersSchedule(diffusers.FlowMatchEulerDiscreteScheduler())
    for sampler, pair in ((flow, (RectifiedFlow(), own)), (edm, (EDM(), VE()))):
        found = [
            sampler.solve(gaussian_denoiser(schedule, 0.5), schedule, noise) for schedule in pair
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "schedule", "message"),
    [
        (
            diffusers.DDIMScheduler(),
            VP(),
            r"`schedule` must be a DiffusersSchedule of 1000 steps and its betas for DDIMScheduler "
            r".* got VP: use .*DPMSolver2M\(\)",
        ),
        (
            diffusers.DDIMScheduler(),
            DiffusersSchedule(diffusers.DDPMScheduler(beta_schedule="scaled_linear")),
            "`schedule` must be a DiffusersSchedule of 1000 steps and its betas",
        ),
        (
            diffusers.DDIMScheduler(),
            DiffusersSchedule(diffusers.FlowMatchEulerDiscreteScheduler()),
            "`schedule` must be a DiffusersSchedule of 1000 steps",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            EDM(),
            r"`schedule` must be RectifiedFlow\(\) or a flow of 1000 steps .* got EDM",
        ),
        (
            diffusers.EDMEulerScheduler(),
            RectifiedFlow(),
            r"`schedule` must be EDM\(\) or VE\(\) for EDMEulerScheduler .* got RectifiedFlow",
        ),
        (
            diffusers.EDMEulerScheduler(),
            VE(),
            "noise levels of EDMEulerScheduler must lie between 0.01 and 50, .* got 0.002 and 80",
        ),
    ],
)
def test_a_scheduler_of_another_process_is_refused_when_the_model_is_built(
    scheduler, schedule, message
):
    with pytest.raises(ValueError, match=message):
        Diffusion(
            Curved(),
            schedule=schedule,
            prediction=getattr(schedule, "prediction", "edm"),
            sampler=Sampler(DiffusersSolver(scheduler)),
        )


def test_what_a_scheduler_changes_for_sampling_alone_is_free():
    schedule = DiffusersSchedule(diffusers.DDPMScheduler(beta_schedule="scaled_linear"))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", use_karras_sigmas=True
    )
    levels = Sampler(DiffusersSolver(scheduler), 7).noise_levels(schedule)
    assert len(levels) == 7
    assert (levels.diff() < 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiffusersSolver(VP()), "`scheduler` must be a diffusers scheduler, got VP: use"),
        (
            lambda: Sampler(DiffusersSolver(diffusers.DDIMScheduler()), grid="exponential"),
            "`grid` must be left out with DiffusersSolver, .* got exponential",
        ),
        (
            lambda: Sampler(DiffusersSolver(diffusers.DDIMScheduler()), noise_level_max=9.0),
            "`noise_level_max` must be left out with DiffusersSolver",
        ),
        (
            lambda: Sampler(DiffusersSolver(diffusers.DDIMScheduler()), 2000).noise_levels(
                DiffusersSchedule(diffusers.DDIMScheduler())
            ),
            r"`scheduler` must take 2000 steps, but DDIMScheduler does not \(",
        ),
        (
            lambda: DiffusersSolver(
                diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
            ),
            "must step from noise to data, but .* does not .*`mu`",
        ),
        (
            lambda: DiffusersSolver(diffusers.DDPMScheduler(variance_type="learned")),
            "must step from noise to data, but DDPMScheduler does not",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_estimate_that_says_nothing_of_noise_alone_is_refused():
    model = Diffusion(Curved(), schedule=RectifiedFlow(), prediction="epsilon")
    sampler = Sampler(DiffusersSolver(diffusers.FlowMatchEulerDiscreteScheduler()), 5)
    with pytest.raises(ValueError, match=r"`prediction` must say .* noise alone, .* 'velocity'"):
        model.sample(2, shape=(2,), sampler=sampler)
