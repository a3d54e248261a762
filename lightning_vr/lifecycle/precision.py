"""The trainer's precision: how it scales losses."""

from typing import Any

from lightning.pytorch import Trainer


def loss_scaler(trainer: Trainer) -> Any:
    """Return the scaler that keeps float16 gradients from vanishing, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def unscales_itself(optimizer: Any) -> bool:
    """Return whether an optimizer takes scaled gradients, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def loss_scale(trainer: Trainer) -> float:
    """Return the factor that the trainer multiplies losses by."""
    scaler = loss_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())
