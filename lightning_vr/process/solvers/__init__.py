"""Solvers: how a ``Sampler`` goes from noise to a sample. Any of them runs on any schedule."""

from lightning_vr.process.solvers.ancestral import Ancestral
from lightning_vr.process.solvers.ddim import DDIM
from lightning_vr.process.solvers.ddpm import DDPM
from lightning_vr.process.solvers.dpm_solver_2m import DPMSolver2M
from lightning_vr.process.solvers.edm_stochastic import EDMStochastic
from lightning_vr.process.solvers.euler import Euler
from lightning_vr.process.solvers.heun import Heun
from lightning_vr.process.solvers.predictor_corrector import PredictorCorrector
from lightning_vr.process.solvers.rk45 import RK45
from lightning_vr.process.solvers.solver import Problem, Solver

__all__ = [
    "DDIM",
    "DDPM",
    "RK45",
    "Ancestral",
    "DPMSolver2M",
    "EDMStochastic",
    "Euler",
    "Heun",
    "PredictorCorrector",
    "Problem",
    "Solver",
]
