"""What the trainer's precision does to losses."""

from lightning.pytorch import Trainer


def loss_scale(trainer: Trainer) -> float:
    """Return what the trainer multiplies losses by, so that float16 gradients do not vanish."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler else 1.0
