"""Frozen diffusion models as teachers: score distillation, distribution matching, attribution.

The room imports ``training`` and what is below. What loops of one's own need imports no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_vr.teachers.attribution_scores import (
    cosine_scores,
    linear_datamodeling_score,
    trak_scores,
)
from lightning_vr.teachers.distillation import DistillationEstimate, distill
from lightning_vr.teachers.frozen_teacher import FrozenTeacher
from lightning_vr.teachers.gradient_features import GradientFeatures
from lightning_vr.teachers.one_step_student import OneStepStudent
from lightning_vr.teachers.orbit_views import OrbitViews
from lightning_vr.teachers.score_distillation_loss import ScoreDistillationLoss
from lightning_vr.teachers.subset_retraining import SubsetModels, subset_masks

if TYPE_CHECKING:
    from lightning_vr.teachers.distribution_matching import DistributionMatching
    from lightning_vr.teachers.score_distillation import ScoreDistillation

__all__ = [
    "DistillationEstimate",
    "DistributionMatching",
    "FrozenTeacher",
    "GradientFeatures",
    "OneStepStudent",
    "OrbitViews",
    "ScoreDistillation",
    "ScoreDistillationLoss",
    "SubsetModels",
    "cosine_scores",
    "distill",
    "linear_datamodeling_score",
    "subset_masks",
    "trak_scores",
]

_WITH_LIGHTNING = {
    "DistributionMatching": "distribution_matching",
    "ScoreDistillation": "score_distillation",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_LIGHTNING:
        return getattr(import_module(f"{__name__}.{_WITH_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
