"""Variance-reduced diffusion training for PyTorch Lightning.

Names are imported from their rooms when they are asked for, so that tensors need no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_vr.auditing import Audit, Candidate, audit
    from lightning_vr.callbacks import (
        Evaluation,
        FrechetDistance,
        GradientVariance,
        SampleGrid,
        TargetVariance,
    )
    from lightning_vr.cli import VRCLI
    from lightning_vr.core import Clean, LossEstimate, Noised, TargetEstimate
    from lightning_vr.estimators import (
        CARV,
        DSM,
        IID,
        STF,
        LearnedProposal,
        LearnedVariance,
        TableProposal,
        TaylorCV,
        WeightProposal,
        distillation_loss,
    )
    from lightning_vr.lifecycle import DurableCheckpointIO, ResumableModule
    from lightning_vr.posterior import References, posterior_mean
    from lightning_vr.process import (
        EDM,
        VE,
        VP,
        AncestralSampler,
        Cosine,
        DiffusersSchedule,
        EDMWeighting,
        InDtype,
        Likelihood,
        LogitNormal,
        LogNormal,
        LogNormalWeighting,
        LogUniform,
        MinSNRWeighting,
        Objective,
        Pretrained,
        RectifiedFlow,
        ResidualMLP,
        Sampler,
        Shifted,
        Uniform,
        UnitWeighting,
        VariationalBound,
    )
    from lightning_vr.training import Diffusion, DiffusionModule

__all__ = [
    "CARV",
    "DSM",
    "EDM",
    "IID",
    "STF",
    "VE",
    "VP",
    "VRCLI",
    "AncestralSampler",
    "Audit",
    "Candidate",
    "Clean",
    "Cosine",
    "DiffusersSchedule",
    "Diffusion",
    "DiffusionModule",
    "DurableCheckpointIO",
    "EDMWeighting",
    "Evaluation",
    "FrechetDistance",
    "GradientVariance",
    "InDtype",
    "LearnedProposal",
    "LearnedVariance",
    "Likelihood",
    "LogNormal",
    "LogNormalWeighting",
    "LogUniform",
    "LogitNormal",
    "LossEstimate",
    "MinSNRWeighting",
    "Noised",
    "Objective",
    "Pretrained",
    "RectifiedFlow",
    "References",
    "ResidualMLP",
    "ResumableModule",
    "SampleGrid",
    "Sampler",
    "Shifted",
    "TableProposal",
    "TargetEstimate",
    "TargetVariance",
    "TaylorCV",
    "Uniform",
    "UnitWeighting",
    "VariationalBound",
    "WeightProposal",
    "audit",
    "distillation_loss",
    "posterior_mean",
]

# those without Lightning first: asking for a name imports no room beyond its own
_ROOMS = (
    "core",
    "process",
    "posterior",
    "estimators",
    "training",
    "lifecycle",
    "callbacks",
    "auditing",
    "cli",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for room in _ROOMS:
            module = import_module(f"{__name__}.{room}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
