"""A random projection of gradients, block by block: few numbers that keep inner products.

With independent signs S ``(P, d)``, ``E ⟨gS, hS⟩ / d = ⟨g, h⟩`` (Johnson and Lindenstrauss; Park et
al. 2023, "TRAK", arXiv 2303.14186, section 3.2). It is linear, so that the mean over draws is
projected, once. Signs are a function of a seed: they are kept as long as they are few, else made
again for each chunk of gradients.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_vr.core.rng import generator
from lightning_vr.core.validation import check_integer

_BLOCK = 1 << 22
"""Signs that are made at a time: 16 MB."""

_KEPT = 1 << 26
"""Signs that are kept: 256 MB."""


class RandomProjection:
    """Projects gradients of P numbers to d.

    Args:
        size: P.
        dimension: d.
        seed: Seed of the signs.

    Raises:
        ValueError: If d is larger than P.
    """

    def __init__(self, size: int, dimension: int, seed: int) -> None:
        check_integer("projection", dimension, 1)
        if dimension > size:
            raise ValueError(
                f"`projection` must be at most {size}, the number of parameters, got {dimension}: "
                f"use fewer, or None for gradients as they are."
            )
        self.size, self.dimension, self.seed = size, dimension, seed
        self._kept: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return projected gradients ``(n, d)``.

        Args:
            gradients: For each parameter, the gradients of n samples ``(n, *)``.
        """
        flat = torch.cat([each.flatten(1) for each in gradients], dim=1).float()
        total = flat.new_zeros(len(flat), self.dimension)
        for start, signs in self._blocks(flat.device):
            total.addmm_(flat[:, start : start + len(signs)], signs)
        return total.div_(self.dimension**0.5)

    def _blocks(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        rows = max(1, _BLOCK // self.dimension)
        keep = self.size * self.dimension <= _KEPT
        for start in range(0, self.size, rows):
            signs = self._kept.get((start, device))
            if signs is None:
                shape = min(rows, self.size - start), self.dimension
                source = generator(self.seed, "projection", start, device=device)
                bits = torch.randint(0, 2, shape, generator=source, device=device)
                signs = 2.0 * bits.float() - 1.0
                if keep:
                    self._kept[start, device] = signs
            yield start, signs
