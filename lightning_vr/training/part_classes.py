"""The class that each part of a model must be of; what is given by name or as a class is none."""

from typing import Any

from torch import nn

from lightning_vr.core.validation import check_instance
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.learned_variance import LearnedVariance
from lightning_vr.estimators.loss import ControlVariate
from lightning_vr.estimators.targets import Target
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import Weighting

_PARTS: dict[str, tuple[type, str]] = {
    "network": (nn.Module, "a network, as ResidualMLP() or a model of diffusers"),
    "timesteps": (Density, "an object, as LogNormal(), or leave it out"),
    "weighting": (Weighting, "an object, as UnitWeighting(), or leave it out"),
    "draws": (Draws, "an object, as IID() or CARV(1)"),
    "target": (Target, "an object, as DSM() or STF('batch')"),
    "control_variate": (ControlVariate, "an object, as TaylorCV(), or leave it out"),
    "sampler": (Sampler, "an object, as Sampler(steps=50)"),
    "variance": (LearnedVariance, "an object, as LearnedVariance(), or leave it out"),
}


def check_part_classes(*parts: Any) -> None:
    """Raise if a part of a model, unless it is None, is no object of its class.

    Args:
        *parts: The network, and what fills the other parts in the order of this file.

    Raises:
        ValueError: Naming the part and what to use.
    """
    for name, value in zip(_PARTS, parts, strict=True):
        if value is not None or name == "network":
            check_instance(name, value, *_PARTS[name])
