"""A scheduler of diffusers as the schedule of a model."""

from typing import get_args

import diffusers
import pytest
import torch

from lightning_vr.callbacks.convergence import Convergence
from lightning_vr.callbacks.gradient_variance import GradientVariance
from lightning_vr.callbacks.target_variance import TargetVariance
from lightning_vr.process.diffusers_schedule import DiffusersSchedule, as_schedule
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.schedules import VP
from lightning_vr.process.timesteps import LogitNormal, Shifted, Uniform
from lightning_vr.process.weightings import UnitWeighting
from lightning_vr.training.diffusion import Diffusion


@pytest.fixture
def ddpm():
    return diffusers.DDPMScheduler(beta_end=0.01)


@pytest.fixture
def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}


@pytest.mark.parametrize("stated", PREDICTIONS)
@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_a_prediction_that_the_scheduler_would_misread_is_refused(stated, kind):
    if stated == "flow_prediction":
        scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type=stated)
    else:
        scheduler = diffusers.DDIMScheduler(prediction_type=stated)
    if kind == PREDICTIONS[stated]:
        Diffusion(ResidualMLP(), scheduler, kind)
        return
    right = PREDICTIONS[stated]
    with pytest.raises(
        ValueError,
        match=rf"`prediction` must be '{right}', .*{stated}.* got '{kind}': set `prediction` to",
    ):
        Diffusion(ResidualMLP(), scheduler, kind)


def test_a_flow_matching_scheduler_takes_velocities_alone(flow):
    Diffusion(ResidualMLP(), flow, "velocity")
    with pytest.raises(ValueError, match=r"`prediction` must be 'velocity', .* got 'epsilon'"):
        Diffusion(ResidualMLP(), flow, "epsilon")


def test_a_scheduler_is_wrapped_wherever_a_schedule_is_wanted(ddpm):
    t = torch.arange(1000, dtype=torch.float64)
    expected = DiffusersSchedule(ddpm).sigma(t)
    found = [
        as_schedule(ddpm),
        Diffusion(ResidualMLP(), ddpm, "epsilon").schedule,
        Diffusion(ResidualMLP(), ddpm, "epsilon").objective.schedule,
        Objective(ddpm, Uniform(0, 999), UnitWeighting()).schedule,
        TargetVariance(schedule=ddpm).schedule,
        GradientVariance(schedule=ddpm).given.schedule,
        Convergence(schedule=ddpm).schedule,
    ]
    for schedule in found:
        assert isinstance(schedule, DiffusersSchedule)
        assert torch.equal(schedule.sigma(t), expected)
    own = VP()
    assert as_schedule(own) is own


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            diffusers.DDPMScheduler,
            "got the class DDPMScheduler: .*DiffusersSchedule\\(scheduler\\)",
        ),
        (VP, "got the class VP: use"),
        ("VP", "got 'VP': use EDM"),
        (Uniform(), "got a Uniform: use EDM"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_fix(wrong, message):
    with pytest.raises(
        ValueError, match=f"`schedule` must be a schedule or a diffusers .*{message}"
    ):
        Diffusion(ResidualMLP(), wrong)


@pytest.mark.parametrize("density", [Uniform(), LogitNormal()])
def test_times_from_0_to_1_are_refused_for_a_scheduler_of_a_thousand_steps(density, flow):
    with pytest.raises(ValueError, match=r"`timesteps` must draw .* from 1 to 999, .* above 1: .*"):
        Diffusion(ResidualMLP(), flow, "velocity", timesteps=density)
    Diffusion(ResidualMLP(), flow, "velocity", timesteps=Shifted(density, end=1000))


def test_a_shift_by_the_size_of_the_picture_needs_a_density_of_the_user():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    options = {"schedule": scheduler, "prediction": "velocity"}
    with pytest.raises(ValueError, match=r"`timesteps` must be given .*use_dynamic_shifting"):
        Diffusion(ResidualMLP(), **options)
    given = Shifted(Uniform(0.001, 0.999), shift=3.0, end=1000)
    assert Diffusion(ResidualMLP(), timesteps=given, **options).timesteps is given
