"""Distances between sets of real and generated samples.

The room imports ``core`` alone.
"""

from lightning_vr.metrics.features import (
    DigitFeatures,
    Features,
    IdentityFeatures,
    InceptionFeatures,
    RandomConvFeatures,
)
from lightning_vr.metrics.frechet_metric import FrechetMetric, frechet_distance

__all__ = [
    "DigitFeatures",
    "Features",
    "FrechetMetric",
    "IdentityFeatures",
    "InceptionFeatures",
    "RandomConvFeatures",
    "frechet_distance",
]
