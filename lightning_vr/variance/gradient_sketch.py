"""Sketches of gradients: a few ten thousand numbers whose inner products are those of gradients.

Each coordinate is added, with a random sign, to a random one of k numbers (CountSketch: Charikar,
Chen and Farach-Colton 2002, "Finding frequent items in data streams"). Of two gradients sketched
alike ``E ⟨Sa, Sb⟩ = ⟨a, b⟩`` over signs, and the variance is at most
``(‖a‖² ‖b‖² + ⟨a, b⟩²) / k``. It costs one pass over a gradient, and no matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Coordinates at a time, so that their signs and places take little memory."""


def sketched(gradients: Sequence[Tensor], size: int, source: torch.Generator) -> Tensor:
    """Return the sketch of a gradient, or the gradient itself if that is not larger.

    Args:
        gradients: The gradient by each parameter, in order.
        size: k, how many numbers a sketch has.
        source: Gives signs and places: gradients that are to be multiplied need equal ones.

    Returns:
        Float32 ``(min(size, numbers of the gradient),)``; float64 if the gradient is.
    """
    is_double = all(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if is_double else torch.float32
    if sum(gradient.numel() for gradient in gradients) <= size:
        return torch.cat([gradient.flatten().to(dtype) for gradient in gradients])
    found = torch.zeros(size, dtype=dtype, device=gradients[0].device)
    for gradient in gradients:
        for part in torch.split(gradient.flatten(), _CHUNK):
            drawn = torch.randint(
                2 * size, part.shape, generator=source, device=part.device, dtype=torch.int32
            )
            found.index_add_(0, drawn // 2, part.to(dtype) * (2 * (drawn % 2) - 1))
    return found
