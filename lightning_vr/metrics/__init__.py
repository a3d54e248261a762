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
from lightning_vr.metrics.image_classifier import ClassifierFeatures, ImageClassifier
from lightning_vr.metrics.kernel_distance import kernel_distance
from lightning_vr.metrics.memorisation import Memorisation, memorisation
from lightning_vr.metrics.precision_recall import precision_recall

__all__ = [
    "ClassifierFeatures",
    "DigitFeatures",
    "Features",
    "FrechetMetric",
    "IdentityFeatures",
    "ImageClassifier",
    "InceptionFeatures",
    "Memorisation",
    "RandomConvFeatures",
    "frechet_distance",
    "kernel_distance",
    "memorisation",
    "precision_recall",
]
