"""What flows through the package and what all rooms share. It imports no other room.

Bundles of tensors (``types``) and their rows, keyed randomness, collectives, sharded parameters,
gradients in chunks, devices, and checks of arguments.
"""

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean, LossEstimate, Noised, StepPart, TargetEstimate, Times

__all__ = [
    "Clean",
    "LossEstimate",
    "Noised",
    "StepPart",
    "TargetEstimate",
    "Times",
    "generator",
]
