"""Sums over per-sample or batch gradients that the nested design needs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_reduce_sum
from lightning_vr.variance.components import DRAWS_PER_UNIT, Components, NestedSums


class GradientSums:
    """Inner products within units and the sum over units, added up as gradients arrive.

    Args:
        groups: The group of each parameter.
        is_sharded: Whether this rank has a part of each gradient, and the sums are over ranks.
    """

    def __init__(self, groups: Sequence[int], *, is_sharded: bool = False) -> None:
        self._over_ranks = all_reduce_sum if is_sharded else Tensor.detach
        self._groups = groups
        self._nested = NestedSums(max(groups) + 1)
        self._sum: list[Tensor] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add units: for each parameter a tensor ``(4 · units, *)``, a unit's draws in a row."""
        units = len(gradients[0]) // DRAWS_PER_UNIT
        shape = (max(self._groups) + 1, units, DRAWS_PER_UNIT, DRAWS_PER_UNIT)
        dtype = widest_float(gradients[0].device)
        products = gradients[0].new_zeros(shape, dtype=dtype)
        totals = []
        for group, gradient in zip(self._groups, gradients, strict=True):
            values = gradient.reshape(units, DRAWS_PER_UNIT, gradient[0].numel())
            values = values if values.dtype == torch.float64 else values.float()
            products[group] += values @ values.mT
            # a product reads the gradients once, twice as fast as a sum over rows
            means = values.new_full((len(gradient),), 1 / DRAWS_PER_UNIT)
            totals.append(means @ values.flatten(0, 1))
        self._nested.add(self._over_ranks(products))
        pairs = zip(self._sum, totals, strict=True)
        self._sum = [a + b for a, b in pairs] if self._sum else totals

    def components(self) -> Components:
        """Return the components of the whole gradient first, then of each group."""
        squares = self._over_ranks(torch.stack([total @ total for total in self._sum]))
        squared_sum = torch.zeros(max(self._groups) + 1, dtype=torch.float64)
        squared_sum.index_add_(0, torch.tensor(self._groups), squares.cpu().double())
        return self._nested.components(squared_sum)
