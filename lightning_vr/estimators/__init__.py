"""Estimators of the diffusion loss, for the three slots of a model.

Draws of times and noise (``IID``, ``CARV``), targets (``DSM``, ``STF``) and control variates
(``TaylorCV``), and the loss that combines them; ``TimestepSampler`` draws times for other losses.
The room imports ``core``, ``process`` and ``posterior``.
"""

from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.learned_variance import LearnedVariance
from lightning_vr.estimators.loss import ControlVariate
from lightning_vr.estimators.proposals import (
    LearnedProposal,
    Proposal,
    TableProposal,
    WeightProposal,
)
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM, Target
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.estimators.timestep_sampler import TimestepSampler

__all__ = [
    "CARV",
    "DSM",
    "IID",
    "STF",
    "ControlVariate",
    "Draws",
    "LearnedProposal",
    "LearnedVariance",
    "Proposal",
    "TableProposal",
    "Target",
    "TaylorCV",
    "TimestepSampler",
    "WeightProposal",
]
