"""Data modules: handwritten digits, points from known densities, the user's own images, latents.

The room imports ``core`` alone.
"""

from lightning_vr.data.cached_latents import CachedLatents
from lightning_vr.data.conditions import Conditions
from lightning_vr.data.datamodule import SplitDataModule
from lightning_vr.data.dataset import InMemoryDataset, SampleDataset
from lightning_vr.data.digits import Digits, digits
from lightning_vr.data.folder import ImageFolder
from lightning_vr.data.huggingface import HuggingFaceImages
from lightning_vr.data.image_error import ImageError
from lightning_vr.data.mixture import GaussianMixture
from lightning_vr.data.synthetic import Checkerboard, EightGaussians, Moons
from lightning_vr.data.two_gaussians import TwoGaussians, two_gaussians_target_variance

__all__ = [
    "CachedLatents",
    "Checkerboard",
    "Conditions",
    "Digits",
    "EightGaussians",
    "GaussianMixture",
    "HuggingFaceImages",
    "ImageError",
    "ImageFolder",
    "InMemoryDataset",
    "Moons",
    "SampleDataset",
    "SplitDataModule",
    "TwoGaussians",
    "digits",
    "two_gaussians_target_variance",
]
