"""The trainer's precision: how it scales losses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer


def loss_scaler(trainer: Trainer) -> Any:
    """Return the scaler that keeps float16 gradients from vanishing, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def unscales_itself(optimizer: Any) -> bool:
    """Return whether an optimizer takes scaled gradients, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextmanager
def clippable(trainer: Trainer, optimizer: Any) -> Iterator[None]:
    """Let the trainer clip gradients for a fused optimizer where it does not scale losses.

    Lightning refuses that in bf16-mixed as in 16-mixed, by this attribute. Seen in Lightning 2.6,
    in ``MixedPrecision.clip_gradients``; ``tests/training/test_fused_optimizers.py`` fails when it
    changes.
    """
    if loss_scaler(trainer) is not None or not unscales_itself(optimizer):
        yield
        return
    optimizer._step_supports_amp_scaling = False
    try:
        yield
    finally:
        optimizer._step_supports_amp_scaling = True


def loss_scale(trainer: Trainer) -> float:
    """Return the factor that the trainer multiplies losses by."""
    scaler = loss_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())
