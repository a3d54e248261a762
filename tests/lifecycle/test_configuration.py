"""Objects as configurations: what is described rebuilds, what does not rebuild is named."""

import functools

import numpy as np
import pytest
import torch
from support.networks import small_unet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_vr
from lightning_vr import (
    CARV,
    DDIM,
    DDPM,
    DSM,
    EDM,
    IID,
    RK45,
    STF,
    VE,
    VP,
    Ancestral,
    Asymmetric,
    Autoencoder,
    Beta,
    Cosine,
    DiffusersSchedule,
    DiffusersSolver,
    Diffusion,
    DistillationWeighting,
    DPMSolver2M,
    EDMStochastic,
    EDMWeighting,
    EntropyRate,
    Euler,
    FrozenTeacher,
    Heun,
    InDtype,
    LearnedProposal,
    LogitNormal,
    LogNormal,
    LogNormalWeighting,
    LogUniform,
    MinSNRWeighting,
    NoiseLevelDensity,
    OneStepStudent,
    P2Weighting,
    PredictorCorrector,
    Pretrained,
    RectifiedFlow,
    ResidualMLP,
    ResumableModule,
    Sampler,
    ScoreDistillationLoss,
    Shifted,
    SoftMinSNRWeighting,
    TableProposal,
    TaylorCV,
    TimestepSampler,
    TotalWeighting,
    UncertaintyWeighting,
    Uniform,
    UniformSteps,
    UnitWeighting,
    WeightProposal,
)
from lightning_vr.lifecycle.configuration import UndescribableError, describe, import_path, rebuild
from lightning_vr.process import Solver

LEVELS = [0.1, 10.0]


class Plain:
    """Keeps what it is given."""

    def __init__(self, value, items=()):
        self.value = value
        self.items = items


class Inverse(nn.Module):
    """Keeps something else under the argument's name, with the same shapes."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = 1 / scale
        self.linear = nn.Linear(2, 2)


class Wider(nn.Module):
    """Keeps something else under the argument's name, with other shapes."""

    def __init__(self, width=4):
        super().__init__()
        self.width = 2 * width
        self.linear = nn.Linear(2, self.width)


class Numeric(nn.Module):
    """Computes with numbers in its constructor, which the meta device cannot do."""

    def __init__(self, rate=0.1, depth=3):
        super().__init__()
        self.rate, self.depth = rate, depth
        self.rates = [float(rate) for rate in torch.linspace(0, rate, depth)]
        self.linear = nn.Linear(2, 2)


class Nested(nn.Module):
    def __init__(self, inner: nn.Module, depth: int = 1):
        super().__init__()
        self.inner, self.depth = inner, depth


def _objects():
    import diffusers

    return [
        *(EDM(0.01, 40.0), VE(), VP(), Cosine(), RectifiedFlow()),
        *(Uniform(0.1, 0.9), LogUniform(0.1, 2.0), LogNormal(), LogitNormal()),
        *(Shifted(LogitNormal(), shift=3.0, end=1000.0), UniformSteps(9, 2, 7), Beta(0.7, 2.0)),
        *(Asymmetric(0.5), EntropyRate(VP(), LEVELS, [3.0, 1.0])),
        NoiseLevelDensity(VP(), LEVELS, [3.0, 1.0]),
        *(IID(), DSM(), STF(5), STF("all", min_noise_level="auto")),
        *(CARV(4, antithetic=True), CARV("auto", WeightProposal(), antithetic=(0.1, 2.0))),
        *(WeightProposal(), TableProposal([1.0, 2.0]), LearnedProposal("loss", bins=8)),
        CARV(1, LearnedProposal(floor=0.2), scope="sample", chunk_size=3),
        *(TaylorCV(), TaylorCV(1, "rademacher", probes=2, gate=(0.0, 0.3), coefficient=1.0)),
        *(UnitWeighting("v", 0.5), EDMWeighting(), MinSNRWeighting(3.0), LogNormalWeighting()),
        *(SoftMinSNRWeighting(3.0), P2Weighting(2.0), DistillationWeighting("sigma2")),
        *(UncertaintyWeighting(LEVELS, [3.0, 1.0]), TotalWeighting(LEVELS, [3.0, 1.0], Uniform())),
        TimestepSampler(Uniform(), LearnedProposal(), antithetic=True),
        *(DDPM("beta"), Euler(), Heun(), DDIM(0.5), Ancestral(0.3), EDMStochastic(9.0), RK45(1e-4)),
        *(PredictorCorrector(2), DPMSolver2M(), Sampler(DDIM(1.0), 4), Sampler(grid=[9.0, 1.0])),
        DiffusersSolver(diffusers.DDIMScheduler(clip_sample=False)),
        Sampler(guidance_interval=(0.1, 2.0)),
        *(Sampler(steps=4), ResidualMLP(width=8), ResidualMLP(width=8, num_class_embeds=3)),
        *(Numeric(), Nested(Nested(ResidualMLP(width=8))), Plain(Plain(1.5), [Plain(None)])),
        DiffusersSchedule(diffusers.FlowMatchEulerDiscreteScheduler()),
        small_unet(),
        diffusers.DDPMScheduler(beta_end=0.01),
    ]


def state(value):
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, dict):
        return {name: state(x) for name, x in value.items()}
    return getattr(value, "shape", value) if isinstance(value, torch.Tensor) else None


def test_described_objects_rebuild():
    for value in _objects():
        described = describe(value)
        again = rebuild(type(value), described["init_args"])
        assert type(again) is type(value)
        assert describe(again) == described
        assert state(again) == state(value)


def test_every_public_part_of_a_module_is_described():
    described = {type(value).__name__ for value in _objects()}
    parts = {
        name
        for name in lightning_vr.__all__
        if isinstance(kind := getattr(lightning_vr, name), type)
        and issubclass(kind, (nn.Module, Sampler, Solver))
        and not issubclass(kind, (Diffusion, ResumableModule, InDtype, Pretrained, Autoencoder))
        and not issubclass(kind, (FrozenTeacher, OneStepStudent, ScoreDistillationLoss))
    }
    assert parts <= described


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ((1, [2.5, "a"], None), [1, [2.5, "a"], None]),
        ({"a": (True,)}, {"a": [True]}),
        (np.float64(0.5), 0.5),
        (torch.Size([1, 8]), [1, 8]),
        (torch.optim.AdamW, "torch.optim.adamw.AdamW"),
        (
            functools.partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.99)),
            {
                "class_path": "torch.optim.adamw.AdamW",
                "init_args": {"lr": 0.1, "betas": [0.9, 0.99]},
            },
        ),
    ],
)
def test_plain_values_and_callables_are_described(value, described):
    assert describe(value) == described
    plain = describe(value)
    assert type(plain) in (float, str, list, dict)


def swapped():
    network = ResidualMLP(width=8)
    network.blocks[0][2] = nn.ReLU()
    return network


def extended():
    network = ResidualMLP(width=8)
    network.adapter = nn.Linear(2, 2)
    return network


@pytest.mark.parametrize(
    "value",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1),
        functools.partial(torch.optim.SGD, [], 0.1),
        nn.Sequential(nn.Linear(2, 2)),
        Inverse(3.0),
        Wider(),
        swapped(),
        extended(),
        type("Local", (nn.Module,), {})(),
        {1: "a"},
        torch.float32,
        Plain(nn.GELU),
        Plain(functools.partial(nn.GELU)),
        iter([]),
    ],
)
def test_what_does_not_rebuild_is_named_and_not_guessed(value):
    with pytest.raises(UndescribableError):
        describe(value)


def test_an_import_path_leads_back():
    assert import_path(ResidualMLP) == "lightning_vr.process.networks.ResidualMLP"
    shadowed = type("ResidualMLP", (), {"__module__": "lightning_vr.process.networks"})
    with pytest.raises(UndescribableError):
        import_path(shadowed)


@pytest.mark.parametrize("make", [lambda: ResidualMLP(width=8), Numeric], ids=["meta", "real"])
def test_describing_leaves_random_state_unchanged(make):
    value = make()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    describe(value)
    assert torch.equal(torch.get_rng_state(), before)


class Built(TorchDispatchMode):
    """Counts the numbers that operations make on a CPU."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not func.is_view:
            self.numbers += sum(x.numel() for x in made if x.device.type == "cpu")
        return out


def test_describing_a_big_network_builds_no_weights():
    network = ResidualMLP(width=512, depth=4)
    with Built() as built:
        describe(network)
    assert built.numbers < 512
    with built:
        ResidualMLP(width=512, depth=4)
    assert built.numbers > sum(p.numel() for p in network.parameters())
