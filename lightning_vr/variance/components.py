"""Components of gradient variance: from data, timestep and noise (nested analysis of variance).

For the gradient g(x, t, z) of one draw, by the law of total variance in the order x, t, z,

    V_x = tr Cov( E[g | x] ),   V_t = E tr Cov( E[g | x, t] | x ),   V_z = E tr Cov( g | x, t ),

and ``V = V_x + V_t + V_z``. Each difference of neighbours in

    E ‖g‖²  >=  E⟨g, g'⟩ same x, t  >=  E⟨g, g'⟩ same x  >=  ‖E g‖² = E⟨g, g'⟩ nothing shared

is one component: V_z, V_t and V_x. The four means of inner products come from a nested design of
n units. Each has one x, two times t and two noises z for each time; g' shares with g what the line
says and is otherwise independent of it. So every component is unbiased, and small ones may come out
negative: judge them by their standard errors.

A unit is either one sample, whose four gradients are per-sample gradients, or a batch of b samples
with independent times and noises in each, whose four gradients are those of its mean loss. Then the
components are 1/b as large, and include whatever an estimator shares within a batch.

The noise ratio that decides whether less variance helps is ``V / ‖E g‖²``, the simple noise scale
(McCandlish et al. 2018, arXiv 1812.06162, equation 2.9): the number of draws at which the noise of
the mean gradient is as large as the gradient. Whatever else is random at given t and x (dropout,
drawn references, dropped labels) counts as noise z.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.distributed import all_reduce_mean

PARTS = ("data", "timestep", "noise")
"""Names of the components that sum to the total, outermost first."""

DRAWS_PER_UNIT = 4
"""Draws of a unit in the order (t, z), (t, z'), (t', z''), (t', z''')."""


class Components(NamedTuple):
    """Components of the variance of a gradient as traces; each tensor has one element per column.

    Attributes:
        data: V_x.
        timestep: V_t.
        noise: V_z.
        total: V, their sum.
        squared_mean: ``‖E g‖²``; an unbiased estimate, negative at times.
    """

    data: Tensor
    timestep: Tensor
    noise: Tensor
    total: Tensor
    squared_mean: Tensor

    @property
    def second_moment(self) -> Tensor:
        """``E ‖g‖²``."""
        return self.total + self.squared_mean

    @property
    def signal_to_noise(self) -> Tensor:
        """``‖E g‖² / V``, of one draw."""
        return self.squared_mean / self.total

    @property
    def noise_scale(self) -> Tensor:
        """``V / ‖E g‖²``, in draws; NaN where the squared mean is not resolved from zero."""
        return torch.where(self.squared_mean > 0, self.total / self.squared_mean, torch.nan)

    def over_ranks(self, device: torch.device) -> "Components":
        """Return the mean over ranks, each with its own data; all must call it."""
        return Components(*all_reduce_mean(torch.stack(self).to(device)).cpu())

    def scaled(self, batch: float) -> "Components":
        """Return the components per draw from those of the mean of ``batch`` draws."""
        data, timestep, noise, total, squared_mean = self
        return Components(
            batch * data, batch * timestep, batch * noise, batch * total, squared_mean
        )


def nested_components(
    squares: Tensor, same_time: Tensor, same_data: Tensor, unit_means: Tensor, total_mean: Tensor
) -> Components:
    """Return unbiased components from means of inner products over n units.

    Args:
        squares: Mean of ``‖g‖²`` over units and draws.
        same_time: Mean of ``⟨g, g'⟩`` over pairs of the same x and t.
        same_data: Mean of ``⟨g, g'⟩`` over pairs of the same x and different t.
        unit_means: ``Σ_u ‖ḡ_u‖² / (n (n - 1))``, ḡ the mean of a unit's four draws.
        total_mean: ``‖Σ_u ḡ_u‖² / (n (n - 1))``.
    """
    squared_mean = total_mean - unit_means
    return Components(
        data=same_data - squared_mean,
        timestep=same_time - same_data,
        noise=squares - same_time,
        total=squares - squared_mean,
        squared_mean=squared_mean,
    )


def two_batch_sizes(
    mean_square: Tensor, square_of_mean: Tensor, batches: int, batch: int
) -> Components:
    """Return the total variance per draw from gradients of batches and of their union.

    McCandlish et al. 2018, arXiv 1812.06162, appendix A.1: both sizes come for free from
    micro-batches or ranks. The components of the total are not known: they are NaN.

    Args:
        mean_square: Mean of ``‖G_m‖²`` over the batches, for each column.
        square_of_mean: ``‖mean of G_m‖²``.
        batches: How many, two or more.
        batch: Draws in each.
    """
    between = (mean_square - square_of_mean) / (batches - 1)
    unknown = torch.full_like(between, torch.nan)
    total = batch * batches * between
    return Components(unknown, unknown, unknown, total, square_of_mean - between)


class NestedSums:
    """Sums over units, in float64, from which components follow.

    Args:
        columns: Number of parts of the gradient with sums of their own.
    """

    def __init__(self, columns: int) -> None:
        self.units = 0
        self._sums = torch.zeros(4, columns, dtype=torch.float64)

    def add(self, products: Tensor) -> None:
        """Add units.

        Args:
            products: Inner products of a unit's four gradients with each other, for each part of
                the gradient, ``(columns, units, 4, 4)``.
        """
        products = products.detach().cpu().double()
        squares = products.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        same_time = 0.5 * (products[..., 0, 1] + products[..., 2, 3])
        same_data = products[..., :2, 2:].mean(dim=(-2, -1))
        unit_means = products.mean(dim=(-2, -1))
        self.units += products.shape[1]
        self._sums += torch.stack([squares, same_time, same_data, unit_means]).sum(dim=-1)

    def components(self, squared_sum: Tensor) -> Components:
        """Return the components of each column and, first, of the whole gradient.

        Args:
            squared_sum: ``‖Σ_u ḡ_u‖²`` of each column, ``(columns,)``.
        """
        sums = torch.cat([self._sums.sum(dim=1, keepdim=True), self._sums], dim=1)
        total = squared_sum.detach().cpu().double()
        total = torch.cat([total.sum(dim=0, keepdim=True), total])
        pairs = self.units * (self.units - 1)
        squares, same_time, same_data = sums[:3] / self.units
        return nested_components(squares, same_time, same_data, sums[3] / pairs, total / pairs)
