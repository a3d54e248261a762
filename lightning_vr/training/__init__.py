"""Training: the model, its LightningModule, and what prepares and checks a run.

The room imports every floor below it; ``diffusion.py`` alone imports no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_vr.training.diffusion import Diffusion

if TYPE_CHECKING:
    from lightning_vr.training.latent_cache import cache_latents
    from lightning_vr.training.latents import LatentDiffusionModule
    from lightning_vr.training.module import DiffusionModule

__all__ = ["Diffusion", "DiffusionModule", "LatentDiffusionModule", "cache_latents"]

_WITH_LIGHTNING = {
    "DiffusionModule": "module",
    "LatentDiffusionModule": "latents",
    "cache_latents": "latent_cache",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_LIGHTNING:
        return getattr(import_module(f"{__name__}.{_WITH_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
