"""Sums over per-sample or batch gradients that the nested design needs, exact or sketched.

A random sketch keeps all inner products unbiased, as ``E⟨Sg, Sg'⟩ = ⟨g, g'⟩`` for random signs
folded onto k numbers (Charikar, Chen and Farach-Colton 2002), at a relative error of about
``sqrt(2 / k)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_vr.core.devices import widest_float
from lightning_vr.variance.components import DRAWS_PER_UNIT, Components, NestedSums


class GradientSums:
    """Inner products within units and the sum over units, from gradients as they come.

    Args:
        groups: The group of each parameter.
        sketch: Keep at most so many numbers of each parameter's gradient, or None for all.
        source: Generator of the sketch's signs; needed with ``sketch``.
    """

    def __init__(
        self, groups: Sequence[int], sketch: int | None, source: torch.Generator | None
    ) -> None:
        self._groups = groups
        self._sketch, self._source = sketch, source
        self._signs: dict[int, Tensor] = {}
        self._nested = NestedSums(max(groups) + 1)
        self._sum: list[Tensor] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add units: for each parameter a tensor ``(4 · units, *)``, a unit's draws in a row."""
        units = len(gradients[0]) // DRAWS_PER_UNIT
        shape = (max(self._groups) + 1, units, DRAWS_PER_UNIT, DRAWS_PER_UNIT)
        dtype = widest_float(gradients[0].device)
        products = gradients[0].new_zeros(shape, dtype=dtype)
        totals = []
        for i, (group, gradient) in enumerate(zip(self._groups, gradients, strict=True)):
            values = self._sketched(i, gradient.reshape(units, DRAWS_PER_UNIT, -1))
            products[group] += values @ values.mT
            # a product reads the gradients once, twice as fast as a sum over rows
            means = values.new_full((len(gradient),), 1 / DRAWS_PER_UNIT)
            totals.append(means @ values.flatten(0, 1))
        self._nested.add(products)
        pairs = zip(self._sum, totals, strict=True)
        self._sum = [a + b for a, b in pairs] if self._sum else totals

    def components(self) -> Components:
        squared_sum = torch.zeros(max(self._groups) + 1, dtype=torch.float64)
        for group, total in zip(self._groups, self._sum, strict=True):
            squared_sum[group] += float(total @ total)
        return self._nested.components(squared_sum)

    def _sketched(self, i: int, values: Tensor) -> Tensor:
        values = values if values.dtype == torch.float64 else values.float()
        size, count = values.shape[-1], self._sketch
        if count is None or size <= count:
            return values
        # an even number may divide the rows of a weight: each column would fold onto itself
        count -= 1 - count % 2
        padded = nn.functional.pad(values, (0, -size % count))
        if i not in self._signs:
            bits = torch.randint(2, padded.shape[-1:], generator=self._source, device=values.device)
            self._signs[i] = (2 * bits - 1).to(torch.int8)
        return (padded * self._signs[i]).reshape(*values.shape[:-1], -1, count).sum(dim=-2)
