"""Variance-reduced diffusion training for PyTorch Lightning.

Names are imported from their rooms when they are asked for, so that tensors need no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_vr.auditing import (
        Audit,
        AuditDuringTraining,
        Candidate,
        audit,
        error_budget,
    )
    from lightning_vr.callbacks import (
        Convergence,
        Evaluation,
        FrechetDistance,
        GradientSignal,
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
        TimestepSampler,
        WeightProposal,
    )
    from lightning_vr.lifecycle import (
        EMA,
        DurableCheckpointIO,
        ResumableModule,
        ShardedStrategy,
        saved_average,
    )
    from lightning_vr.pipelines import export, to_pipeline
    from lightning_vr.posterior import References, posterior_mean
    from lightning_vr.process import (
        DDIM,
        DDPM,
        EDM,
        RK45,
        VE,
        VP,
        Ancestral,
        Asymmetric,
        Autoencoder,
        AutoencoderFolder,
        Beta,
        Cosine,
        DiffusersSchedule,
        DiffusersSolver,
        DistillationWeighting,
        DPMSolver2M,
        EDMStochastic,
        EDMWeighting,
        EntropyRate,
        Euler,
        Heun,
        InDtype,
        Likelihood,
        LogitNormal,
        LogNormal,
        LogNormalWeighting,
        LogUniform,
        MinSNRWeighting,
        NoiseLevelDensity,
        Objective,
        P2Weighting,
        PredictorCorrector,
        Pretrained,
        RectifiedFlow,
        ResidualMLP,
        Sampler,
        Shifted,
        SoftMinSNRWeighting,
        TotalWeighting,
        UncertaintyWeighting,
        Uniform,
        UniformSteps,
        UnitWeighting,
        VariationalBound,
    )
    from lightning_vr.teachers import (
        DistributionMatching,
        FrozenTeacher,
        GradientFeatures,
        OneStepStudent,
        OrbitViews,
        ScoreDistillation,
        ScoreDistillationLoss,
    )
    from lightning_vr.training import (
        Diffusion,
        DiffusionModule,
        LatentDiffusionModule,
        cache_latents,
    )
    from lightning_vr.variance import ConvergenceMonitor

__all__ = [
    "CARV",
    "DDIM",
    "DDPM",
    "DSM",
    "EDM",
    "EMA",
    "IID",
    "RK45",
    "STF",
    "VE",
    "VP",
    "VRCLI",
    "Ancestral",
    "Asymmetric",
    "Audit",
    "AuditDuringTraining",
    "Autoencoder",
    "AutoencoderFolder",
    "Beta",
    "Candidate",
    "Clean",
    "Convergence",
    "ConvergenceMonitor",
    "Cosine",
    "DPMSolver2M",
    "DiffusersSchedule",
    "DiffusersSolver",
    "Diffusion",
    "DiffusionModule",
    "DistillationWeighting",
    "DistributionMatching",
    "DurableCheckpointIO",
    "EDMStochastic",
    "EDMWeighting",
    "EntropyRate",
    "Euler",
    "Evaluation",
    "FrechetDistance",
    "FrozenTeacher",
    "GradientFeatures",
    "GradientSignal",
    "GradientVariance",
    "Heun",
    "InDtype",
    "LatentDiffusionModule",
    "LearnedProposal",
    "LearnedVariance",
    "Likelihood",
    "LogNormal",
    "LogNormalWeighting",
    "LogUniform",
    "LogitNormal",
    "LossEstimate",
    "MinSNRWeighting",
    "NoiseLevelDensity",
    "Noised",
    "Objective",
    "OneStepStudent",
    "OrbitViews",
    "P2Weighting",
    "PredictorCorrector",
    "Pretrained",
    "RectifiedFlow",
    "References",
    "ResidualMLP",
    "ResumableModule",
    "SampleGrid",
    "Sampler",
    "ScoreDistillation",
    "ScoreDistillationLoss",
    "ShardedStrategy",
    "Shifted",
    "SoftMinSNRWeighting",
    "TableProposal",
    "TargetEstimate",
    "TargetVariance",
    "TaylorCV",
    "TimestepSampler",
    "TotalWeighting",
    "UncertaintyWeighting",
    "Uniform",
    "UniformSteps",
    "UnitWeighting",
    "VariationalBound",
    "WeightProposal",
    "audit",
    "cache_latents",
    "error_budget",
    "export",
    "posterior_mean",
    "saved_average",
    "to_pipeline",
]

# those without Lightning first: asking for a name imports no room beyond its own
_ROOMS = (
    "core",
    "process",
    "posterior",
    "estimators",
    "variance",
    "training",
    "teachers",
    "lifecycle",
    "pipelines",
    "callbacks",
    "auditing",
    "cli",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for room in _ROOMS:
            module = import_module(f"{__name__}.{room}")
            if name in module.__all__:
                found = getattr(module, name)
                if hasattr(found, "to_pipeline"):  # the room above tells it how
                    import_module(f"{__name__}.pipelines")
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
