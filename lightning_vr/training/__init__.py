"""Training: the model, its LightningModule, and what prepares and checks a run.

The room imports every floor below it; ``diffusion.py`` alone imports no Lightning.
"""

from typing import TYPE_CHECKING, Any

from lightning_vr.training.diffusion import Diffusion

if TYPE_CHECKING:
    from lightning_vr.training.module import DiffusionModule

__all__ = ["Diffusion", "DiffusionModule"]


def __getattr__(name: str) -> Any:
    if name == "DiffusionModule":
        from lightning_vr.training.module import DiffusionModule

        return DiffusionModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
