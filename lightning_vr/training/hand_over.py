"""What hands a module over to diffusers, and takes one from there.

How a pipeline is made the room ``pipelines`` knows, which stands above this one. It says so here
when it is imported, as ``lightning_vr`` does for whoever asks it for ``DiffusionModule``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning_vr.estimators.learned_variance import LearnedVariance
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.incoming_folder import IncomingFolder

_Module = TypeVar("_Module", bound="HandOver")

_functions: dict[str, Callable[[Any], Any]] = {}


def set_to_pipeline(to_pipeline: Callable[[Any], Any]) -> None:
    """Set what makes a pipeline of a module."""
    _functions["to_pipeline"] = to_pipeline


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
        found = IncomingFolder.read(folder).arguments()
        if "variance" in found:
            found["variance"] = LearnedVariance(**found["variance"])
        return cls(**(found | settings))

    def to_pipeline(self) -> Any:
        """Return a ``DiffusionPipeline`` that samples as this module does.

        Raises:
            ValueError: If none would, with the reason.
        """
        if "to_pipeline" not in _functions:
            raise RuntimeError(
                "`lightning_vr.pipelines` must be imported before a module is handed over: import "
                "it, or take DiffusionModule from `lightning_vr`."
            )
        return _functions["to_pipeline"](self)
