"""Callbacks that watch a run without changing it, on our modules and on others.

The room imports ``training`` and every floor below.
"""

from lightning_vr.callbacks.convergence import Convergence
from lightning_vr.callbacks.evaluation import Evaluation
from lightning_vr.callbacks.frechet_distance import FrechetDistance
from lightning_vr.callbacks.gradient_signal import GradientSignal
from lightning_vr.callbacks.gradient_variance import GradientVariance
from lightning_vr.callbacks.sample_grid import SampleGrid
from lightning_vr.callbacks.target_variance import TargetVariance

__all__ = [
    "Convergence",
    "Evaluation",
    "FrechetDistance",
    "GradientSignal",
    "GradientVariance",
    "SampleGrid",
    "TargetVariance",
]
