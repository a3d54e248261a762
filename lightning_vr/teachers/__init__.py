"""Frozen diffusion models as teachers: score distillation, distribution matching, attribution.

The room imports ``training`` and what is below. What loops of one's own need imports no Lightning.
"""

from lightning_vr.teachers.distillation import DistillationEstimate, distill
from lightning_vr.teachers.frozen_teacher import FrozenTeacher
from lightning_vr.teachers.score_distillation_loss import ScoreDistillationLoss

__all__ = ["DistillationEstimate", "FrozenTeacher", "ScoreDistillationLoss", "distill"]
