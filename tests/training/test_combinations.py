"""What is allowed together trains, samples and goes out to diffusers; what is not says why."""

import re

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from support.covering_arrays import covering_array
from support.diffusers_networks import KINDS, WITH_LABELS, condition, shape_of, tiny

from lightning_vr import (
    DDIM,
    DDPM,
    EDM,
    RK45,
    VE,
    VP,
    Ancestral,
    Clean,
    Cosine,
    DiffusersSchedule,
    DiffusersSolver,
    Diffusion,
    DPMSolver2M,
    EDMStochastic,
    Euler,
    Heun,
    PredictorCorrector,
    RectifiedFlow,
    Sampler,
)
from lightning_vr.core.conditions import expanded, null_condition
from lightning_vr.core.rng import generator
from lightning_vr.pipelines import to_pipeline

# diffusers' own, of numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

SCHEDULES = {
    "EDM": EDM,
    "VE": VE,
    "VP": VP,
    "Cosine": Cosine,
    "RectifiedFlow": RectifiedFlow,
    "DDPM": lambda: DiffusersSchedule(DDPMScheduler()),
    "DDPM, v": lambda: DiffusersSchedule(DDPMScheduler(prediction_type="v_prediction")),
    "flow": lambda: DiffusersSchedule(FlowMatchEulerDiscreteScheduler()),
}
STATED = {"DDPM": "epsilon", "DDPM, v": "v", "flow": "velocity"}
"""What networks of a scheduler predict."""

SOLVERS = {
    "Euler": Euler,
    "Heun": Heun,
    "DDIM": lambda: DDIM(eta=0.5),
    "DDPM": lambda: DDPM("beta"),
    "Ancestral": Ancestral,
    "EDMStochastic": EDMStochastic,
    "PredictorCorrector": PredictorCorrector,
    "DPMSolver2M": DPMSolver2M,
    "RK45": lambda: RK45(rtol=0.1, atol=0.1),
    "DPM++ of diffusers": lambda: DiffusersSolver(DPMSolverMultistepScheduler()),
    "EDM of diffusers": lambda: DiffusersSolver(EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)),
    "flow of diffusers": lambda: DiffusersSolver(FlowMatchEulerDiscreteScheduler()),
}
OF_DIFFUSERS = {
    "DDPM": ("DDPM", "DDPM, v"),
    "DPM++ of diffusers": ("DDPM", "DDPM, v"),
    "EDM of diffusers": ("EDM", "VE"),
    "flow of diffusers": ("RectifiedFlow", "flow"),
}
"""Schedules whose process a scheduler follows."""

GOES_OUT = {
    "EDM": ("edm",),
    "VE": ("edm",),
    "VP": ("epsilon", "v", "x0"),
    "Cosine": ("epsilon", "v", "x0"),
    "RectifiedFlow": ("velocity",),
}
"""What networks of a schedule predict that a scheduler of diffusers takes; those of its own all."""

STAYS = {"MLP": "model of diffusers", "Flux": "samples as they are"}
"""Kinds of networks that no pipeline calls, and what is said of them."""

FACTORS = {
    "schedule": list(SCHEDULES),
    "prediction": ["x0", "epsilon", "v", "score", "velocity", "edm"],
    "solver": list(SOLVERS),
    "kind": list(KINDS),
    "guidance": [1.0, 3.0],
}


def is_allowed(row):
    return reason(row) is None


def reason(row):
    """Return the argument that a combination is refused for, or None."""
    if row["prediction"] != STATED.get(row["schedule"], row["prediction"]):
        return "prediction"
    if row["schedule"] not in OF_DIFFUSERS.get(row["solver"], [row["schedule"]]):
        return "schedule"
    if row["guidance"] != 1 and row["kind"] == "MLP":
        return "guidance"
    # the scheduler begins where nothing of the sample is left, which x0 cannot be told from
    begins_at_noise = row["solver"] == "flow of diffusers" and row["schedule"] == "RectifiedFlow"
    if begins_at_noise and row["prediction"] in ("epsilon", "score"):
        return "prediction"
    return None


def model_of(row):
    kind = row["kind"]
    options = {"num_classes": 3, "label_dropout": 0.1} if kind in WITH_LABELS else {}
    if condition(kind, 1) is not None:
        options |= {"cond_dropout": 0.1, "null_cond": "zeros"}
    # adaptive steps find no end where an untrained score is as large as the noise is
    own = {"noise_level_max": 1.0} if row["solver"] == "RK45" else {"steps": 3}
    sampler = Sampler(SOLVERS[row["solver"]](), guidance=row["guidance"], **own)
    schedule = SCHEDULES[row["schedule"]]()
    return Conditional(tiny(kind), schedule, row["prediction"], sampler=sampler, **options)


class Conditional(Diffusion):
    def encode(self, batch):
        return Clean(**batch)


def reason_to_stay(row):
    """Return what a combination is told that goes out as no pipeline, or None."""
    if row["kind"] in STAYS:
        return STAYS[row["kind"]]
    takes = GOES_OUT.get(row["schedule"], [row["prediction"]])
    return None if row["prediction"] in takes else "^`prediction` must be "


def trained_and_sampled(row, count=2):
    """Train a step on a batch; return the model and samples."""
    model, kind = model_of(row), row["kind"]
    batch = {"x0": torch.randn(count, *shape_of(kind), generator=generator("x0"))}
    asked = {"group": torch.arange(count) % 3 if kind in WITH_LABELS else None}
    asked["cond"] = condition(kind, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model.loss(batch | asked, generator("step")).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    return model, model.sample(count, **asked, seed=0)


def check(row):
    model, samples = trained_and_sampled(row)
    assert samples.shape == (2, *shape_of(row["kind"]))
    assert torch.isfinite(samples).all()
    reason = reason_to_stay(row)
    if reason is None:
        check_pipeline(to_pipeline(model), row)
        return
    with pytest.raises(ValueError, match=reason) as refusal:
        to_pipeline(model)
    assert re.search(r"\S: \S", str(refusal.value))
    assert "\n" not in str(refusal.value)


def check_pipeline(pipeline, row):
    """Draw from a pipeline what its model was asked for."""
    pipeline.set_progress_bar_config(disable=True)
    cond = condition(row["kind"], 2)
    null = None if cond is None else null_condition("zeros", cond)
    null = None if null is None else expanded(null, 2)
    labels = [0, 2] if row["kind"] in WITH_LABELS else None
    asked = {"cond": cond, "null_cond": null, "class_labels": labels}
    images = pipeline(2, **asked, num_inference_steps=2, output_type="latent").images
    assert images.shape == (2, *shape_of(row["kind"]))
    assert torch.isfinite(images).all()


def name(row):
    return ", ".join(str(value) for value in row.values())


@pytest.mark.parametrize("row", covering_array(FACTORS, 2, is_allowed), ids=name)
def test_what_goes_together_trains_a_step_samples_and_goes_out(row):
    check(row)


REFUSED = covering_array(FACTORS, 1, lambda row: not is_allowed(row))


@pytest.mark.parametrize("row", REFUSED, ids=name)
def test_what_does_not_go_together_is_refused_in_one_line(row):
    with pytest.raises(ValueError, match=rf"^`{reason(row)}` .*\S: \S") as refusal:
        trained_and_sampled(row)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("row", covering_array(FACTORS, 3, is_allowed), ids=name)
def test_every_three_that_go_together_train_sample_and_go_out(row):
    check(row)
