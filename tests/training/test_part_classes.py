"""A part of a model that is given by its name or as a class is refused when the model is built."""

import re

import pytest
import torch
from support.networks import small_mlp

from lightning_vr import (
    CARV,
    STF,
    VP,
    AutoencoderFolder,
    Diffusion,
    DiffusionModule,
    DistributionMatching,
    GradientFeatures,
    LatentDiffusionModule,
    LearnedVariance,
    LogNormal,
    Sampler,
    ScoreDistillation,
    ScoreDistillationLoss,
    TaylorCV,
)
from lightning_vr.core.rng import generator


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("network", torch.nn.Linear, "the class Linear"),
        ("network", torch.sin, "a builtin_function_or_method"),
        ("target", "STF", "'STF'"),
        ("target", STF, "the class STF"),
        ("target", CARV(1), "a CARV"),
        ("draws", CARV, "the class CARV"),
        ("control_variate", TaylorCV, "the class TaylorCV"),
        ("timesteps", LogNormal, "the class LogNormal"),
        ("weighting", "edm", "'edm'"),
        ("sampler", 50, "50"),
        ("variance", LearnedVariance, "the class LearnedVariance"),
    ],
)
def test_a_part_that_is_no_object_of_its_class_is_refused(name, value, found):
    parts = {"network": small_mlp(), name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be an object of .*, got {found}: use"):
        Diffusion(**parts)


def test_an_autoencoder_and_a_teacher_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"`autoencoder` must be .*, got a dict: use Autoencoder"):
        LatentDiffusionModule(small_mlp(), autoencoder=vars(AutoencoderFolder("vae")))
    with pytest.raises(ValueError, match=r"`teacher` must be .*, got a ResidualMLP: use Frozen"):
        ScoreDistillationLoss(small_mlp())
    for kind in (ScoreDistillation, DistributionMatching):
        with pytest.raises(ValueError, match=r"`teacher` must be .*, got a ResidualMLP: use Fro"):
            kind(small_mlp())
    with pytest.raises(ValueError, match=r"`model` must be .*, got a ResidualMLP: use a Diffus"):
        GradientFeatures(small_mlp())


def test_an_adapter_and_an_optimizer_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"`adapter` must be .*, got a dict: use LoRA\(rank=8\)"):
        DiffusionModule(small_mlp(), adapter={"rank": 8})
    network = small_mlp()
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(ValueError, match=r"`optimizer` must be a function, got an? AdamW: pass"):
        DiffusionModule(network, optimizer=optimizer)


@pytest.mark.parametrize("solver", [VP(), "ddim"])
def test_what_is_no_solver_is_refused_and_a_scheduler_has_one(solver):
    with pytest.raises(ValueError, match=r"`solver` must be .*DiffusersSolver\(scheduler\)"):
        Sampler(solver)


@pytest.mark.parametrize("value", ["auto", None, [1.0]])
def test_what_is_no_number_is_refused(value):
    said = re.escape(f"must be positive and finite, got {value!r}: use a number above 0")
    with pytest.raises(ValueError, match=f"`sigma_data` {said}"):
        Diffusion(small_mlp(), sigma_data=value)
    with pytest.raises(ValueError, match="`guidance` must be at least 0, got "):
        Sampler(guidance=value)


def test_a_seed_in_place_of_a_generator_is_refused():
    model = Diffusion(small_mlp())
    with pytest.raises(ValueError, match=r"`source` must be a torch.Generator, got int: use one"):
        model.loss(torch.zeros(2, 2), 3)
    model.loss(torch.zeros(2, 2), generator("a generator"))
