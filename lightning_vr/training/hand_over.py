"""What hands a module over to diffusers, and takes one from there.

The room ``pipelines`` stands above this one. It is imported when a method is called, as these are
methods that users look for on a module.
"""

from pathlib import Path
from typing import Any, TypeVar

from lightning_vr.training.diffusion import Diffusion

_Module = TypeVar("_Module", bound="HandOver")


class HandOver(Diffusion):
    """The part of a ``DiffusionModule`` that knows of folders of diffusers."""

    @classmethod
    def from_pretrained(cls: type[_Module], folder: str | Path, **settings: Any) -> _Module:
        """Build a module from a folder of diffusers, to train on.

        The folder's scheduler decides schedule and prediction.

        Args:
            folder: What a pipeline's ``save_pretrained`` or ``export`` wrote.
            **settings: Further arguments of the module; they count before those of the folder.

        Raises:
            ValueError: If the folder lacks a network or a scheduler that can be trained on.
        """
        from lightning_vr.pipelines import IncomingFolder

        return cls(**(IncomingFolder.read(folder).arguments() | settings))

    def to_pipeline(self) -> Any:
        """Return a ``DiffusionPipeline`` that samples as this module does.

        Raises:
            ValueError: If none would, with the reason.
        """
        from lightning_vr.pipelines import to_pipeline

        return to_pipeline(self)
