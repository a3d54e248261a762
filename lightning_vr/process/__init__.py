"""The diffusion process: which noise is added and what a network learns. It imports ``core``.

Schedules and densities of t, predictions and loss weights, the objective that they make together,
networks, and samplers with their solvers.
"""

from lightning_vr.process.asymmetric_density import Asymmetric
from lightning_vr.process.beta_density import Beta
from lightning_vr.process.diffusers_autoencoder import Autoencoder, AutoencoderFolder
from lightning_vr.process.diffusers_network import Pretrained
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.diffusers_solver import DiffusersSolver
from lightning_vr.process.likelihood import Likelihood
from lightning_vr.process.network_dtype import InDtype
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.noise_level_densities import EntropyRate, NoiseLevelDensity
from lightning_vr.process.objective import Objective
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VE, VP, Cosine, RectifiedFlow, Schedule
from lightning_vr.process.solvers import (
    DDIM,
    DDPM,
    RK45,
    Ancestral,
    DPMSolver2M,
    EDMStochastic,
    Euler,
    Heun,
    PredictorCorrector,
    Solver,
)
from lightning_vr.process.timesteps import (
    Density,
    LogitNormal,
    LogNormal,
    LogUniform,
    Shifted,
    Uniform,
    UniformSteps,
)
from lightning_vr.process.total_weight import TotalWeighting
from lightning_vr.process.uncertainty_weighting import UncertaintyWeighting
from lightning_vr.process.variational_bound import VariationalBound
from lightning_vr.process.weightings import (
    DistillationWeighting,
    EDMWeighting,
    LogNormalWeighting,
    MinSNRWeighting,
    P2Weighting,
    SoftMinSNRWeighting,
    UnitWeighting,
    Weighting,
)

__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "RK45",
    "VE",
    "VP",
    "Ancestral",
    "Asymmetric",
    "Autoencoder",
    "AutoencoderFolder",
    "Beta",
    "Cosine",
    "DPMSolver2M",
    "Density",
    "DiffusersSchedule",
    "DiffusersSolver",
    "DistillationWeighting",
    "EDMStochastic",
    "EDMWeighting",
    "EntropyRate",
    "Euler",
    "Heun",
    "InDtype",
    "Likelihood",
    "LogNormal",
    "LogNormalWeighting",
    "LogUniform",
    "LogitNormal",
    "MinSNRWeighting",
    "NoiseLevelDensity",
    "Objective",
    "P2Weighting",
    "PredictorCorrector",
    "Pretrained",
    "RectifiedFlow",
    "ResidualMLP",
    "Sampler",
    "Schedule",
    "Shifted",
    "SoftMinSNRWeighting",
    "Solver",
    "TotalWeighting",
    "UncertaintyWeighting",
    "Uniform",
    "UniformSteps",
    "UnitWeighting",
    "VariationalBound",
    "Weighting",
]
