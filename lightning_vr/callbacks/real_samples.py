"""Real samples that generated ones are compared with, and the features to compare them in."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_vr.metrics import Features, IdentityFeatures, RandomConvFeatures
from lightning_vr.training.module import DiffusionModule

CleanFunction = Callable[[Any], Tensor]
"""``batch -> real samples (B, *)``, for modules that are no ``DiffusionModule``."""


def real_samples(module: LightningModule, clean: CleanFunction | None, batch: Any) -> Tensor:
    """Return the real samples of a batch, in the form of generated ones.

    Raises:
        ValueError: If ``clean`` is not given for a module that is no ``DiffusionModule``.
    """
    with module.trainer.precision_plugin.forward_context():
        if clean is not None:
            return clean(batch)
        if isinstance(module, DiffusionModule):
            return module.decode(module.clean(batch).x0)
    raise ValueError(
        f"`clean` must be given for a {type(module).__name__}, got None: pass a function from a "
        f"training batch to real samples."
    )


def default_features(real: Tensor) -> Features:
    """Return random convolutions for images, and points themselves for points."""
    if real.ndim == 4:
        return RandomConvFeatures(channels=real.shape[1])
    return IdentityFeatures(real[0].numel())


def check_enough(features: Features, **counts: int | None) -> None:
    """Raise if there are no more samples than features, so that no covariance has full rank.

    Args:
        features: The features.
        **counts: Numbers of samples by argument; None is enough.

    Raises:
        ValueError: With the numbers.
    """
    for name, count in counts.items():
        if count is not None and count <= features.dimension:
            raise ValueError(
                f"`{name}` must be more than {features.dimension}, the number of features of "
                f"{features.name!r}, got {count}: use more samples, or features of a smaller "
                f"dimension."
            )


def check_training_set(count: int, features: Features, reader: str) -> None:
    """Raise if a training set is not larger than the number of features.

    Raises:
        ValueError: With the numbers.
    """
    if count <= features.dimension:
        raise ValueError(
            f"The training set must have more than {features.dimension} samples, the number of "
            f"features of {features.name!r}, for `{reader}`, got {count}: use more data, or "
            f"`features` of a smaller dimension."
        )
