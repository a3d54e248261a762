"""Variance-reduced diffusion training for PyTorch Lightning."""

from lightning_vr.auditing import Audit, Candidate, audit
from lightning_vr.callbacks.frechet_distance import FrechetDistance
from lightning_vr.callbacks.gradient_variance import GradientVariance
from lightning_vr.callbacks.sample_grid import SampleGrid
from lightning_vr.callbacks.target_variance import TargetVariance
from lightning_vr.cli import VRCLI
from lightning_vr.core.types import Clean, LossEstimate, Noised, TargetEstimate
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.distillation import distillation_loss
from lightning_vr.estimators.draws import IID
from lightning_vr.estimators.proposals import LearnedProposal, TableProposal, WeightProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.lifecycle.checkpoint_io import DurableCheckpointIO
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.objective import Objective
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VE, VP, Cosine, RectifiedFlow
from lightning_vr.process.timesteps import LogitNormal, LogNormal, LogUniform, Uniform
from lightning_vr.process.weightings import (
    EDMWeighting,
    LogNormalWeighting,
    MinSNRWeighting,
    UnitWeighting,
)
from lightning_vr.training.module import DiffusionModule

__all__ = [
    "CARV",
    "DSM",
    "EDM",
    "IID",
    "STF",
    "VE",
    "VP",
    "VRCLI",
    "Audit",
    "Candidate",
    "Clean",
    "Cosine",
    "DiffusersSchedule",
    "DiffusionModule",
    "DurableCheckpointIO",
    "EDMWeighting",
    "FrechetDistance",
    "GradientVariance",
    "LearnedProposal",
    "LogNormal",
    "LogNormalWeighting",
    "LogUniform",
    "LogitNormal",
    "LossEstimate",
    "MinSNRWeighting",
    "Noised",
    "Objective",
    "RectifiedFlow",
    "References",
    "ResidualMLP",
    "SampleGrid",
    "Sampler",
    "TableProposal",
    "TargetEstimate",
    "TargetVariance",
    "TaylorCV",
    "Uniform",
    "UnitWeighting",
    "WeightProposal",
    "audit",
    "distillation_loss",
    "posterior_mean",
]
