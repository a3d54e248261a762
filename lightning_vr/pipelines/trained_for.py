"""What a network was trained for, as a file beside its weights."""

from dataclasses import asdict
from typing import Any

from lightning_vr.lifecycle.configuration import UndescribableError, describe
from lightning_vr.training.diffusion import Diffusion


def trained_for(model: Diffusion) -> dict[str, Any]:
    """Return the settings without which the weights of a model's network mean nothing."""
    return {
        "schedule": described(model.schedule),
        "prediction": model.prediction,
        "sigma_data": model.sigma_data,
        "num_classes": model.num_classes,
        "label_dropout": model.label_dropout,
        "variance": None if model.variance is None else asdict(model.variance),
        "sample_shape": model.sample_shape,
    }


def described(value: Any) -> dict[str, Any]:
    """Return the settings of an object, or its class alone where they do not rebuild it."""
    try:
        found: dict[str, Any] = describe(value)
    except UndescribableError:
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}"}
    return found
