"""Variance-reduced diffusion training for PyTorch Lightning."""

from lightning_vr.auditing import Audit, Candidate, audit
from lightning_vr.callbacks.fid import FrechetDistance
from lightning_vr.callbacks.gradient_variance import GradientVariance
from lightning_vr.callbacks.samples import SampleGrid
from lightning_vr.callbacks.target_variance import TargetVariance
from lightning_vr.checkpoint_io import DurableCheckpointIO
from lightning_vr.cli import VRCLI
from lightning_vr.diffusers_schedule import DiffusersSchedule
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.distillation import distillation_loss
from lightning_vr.estimators.draws import IID
from lightning_vr.estimators.dsm import DSM
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.taylor import TaylorCV
from lightning_vr.module import DiffusionModule
from lightning_vr.networks import ResidualMLP
from lightning_vr.objective import Objective
from lightning_vr.posterior import posterior_mean
from lightning_vr.proposals import LearnedProposal, TableProposal, WeightProposal
from lightning_vr.references import References
from lightning_vr.sampling import Sampler
from lightning_vr.schedules import EDM, VE, VP, Cosine, RectifiedFlow
from lightning_vr.timesteps import LogitNormal, LogNormal, LogUniform, Uniform
from lightning_vr.types import Clean, LossEstimate, Noised, TargetEstimate
from lightning_vr.weightings import (
    EDMWeighting,
    LogNormalWeighting,
    MinSNRWeighting,
    UnitWeighting,
)

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
