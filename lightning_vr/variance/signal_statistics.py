"""Statistics of a gradient's signal: cosines between noise levels, noise scales, batch sizes.

The noise scale ``B_noise = tr Cov(g) / ‖E g‖²`` is the batch size at which the noise of the mean
gradient is as large as the gradient, and about the critical batch size: up to it twice the batch
takes nearly half the steps, beyond it few less (McCandlish et al. 2018, arXiv 1812.06162).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_vr.variance.joint_moments import JointMoments

_RESOLVED = 2.0
"""Standard errors that a squared mean must be above zero, for a ratio by it to be told."""

_LEAST_MEASUREMENTS = 20
"""Effective measurements before a conflict is told: errors of fewer are themselves unknown."""

_FALSE_ALARMS = 0.01
"""Probability that a conflict is told where there is none, over all pairs that are looked at."""

_Range = tuple[int, int]


class Conflict(NamedTuple):
    """Two ranges of bins whose mean gradients pull against each other.

    Attributes:
        low: First bin of the lower range, and the one after its last.
        high: The same of the upper range.
        cosine: Cosine of their mean gradients, negative.
        error: Its standard error.
    """

    low: _Range
    high: _Range
    cosine: float
    error: float


class SignalStatistics:
    """Means of repeated measurements of ``level_products``.

    Args:
        noise_levels: Noise level in the middle of each bin ``(L,)``; the bins are equally likely.
        axis: What the bins are bins of.
        state: What ``state`` has returned, to continue from there.
    """

    def __init__(self, noise_levels: Tensor, axis: str, state: Any = None) -> None:
        self.noise_levels = noise_levels.detach().cpu()
        self.axis = axis
        self._rows = 1 + len(noise_levels)
        self._upper = torch.triu_indices(self._rows, self._rows)
        self._moments = JointMoments(self._upper.shape[1] + self._rows, state)

    def add(self, products: Tensor, variances: Tensor, memory: float = 1.0) -> None:
        """Add a measurement.

        Args:
            products: Products of mean gradients ``(1 + L, 1 + L)``, of all times first.
            variances: Variance of one sample's gradient ``(1 + L,)``.
            memory: Factor on the weight of all earlier ones.
        """
        self._moments.add(torch.cat([products[tuple(self._upper)], variances]), memory)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been measured yet."""
        return self._moments.count == 0

    @property
    def count(self) -> float:
        """Effective number of measurements."""
        return self._moments.count

    @property
    def products(self) -> tuple[Tensor, Tensor]:
        """Products of mean gradients ``(1 + L, 1 + L)``, and their standard errors."""
        return self._moments.function(self._products)

    @property
    def cosines(self) -> tuple[Tensor, Tensor]:
        """Cosines of mean gradients ``(1 + L, 1 + L)`` and their errors; NaN where unresolved."""
        value, error = self._moments.function(lambda mean: _cosines(self._products(mean)))
        known = self._is_resolved[:, None] & self._is_resolved
        return _known(value, known), _known(error, known)

    @property
    def variances(self) -> tuple[Tensor, Tensor]:
        """Variance of one sample's gradient ``(1 + L,)``, and its standard error."""
        return self._moments.function(self._variances)

    @property
    def noise_scales(self) -> tuple[Tensor, Tensor]:
        """Noise scale in samples ``(1 + L,)`` and its standard error; NaN where unresolved."""
        value, error = self._moments.function(
            lambda mean: self._variances(mean) / self._products(mean).diagonal()
        )
        return _known(value, self._is_resolved), _known(error, self._is_resolved)

    @property
    def least_noise_scales(self) -> Tensor:
        """Noise scale that the signal is at most consistent with ``(1 + L,)``, where unresolved."""
        products, errors = (x.diagonal() for x in self.products)
        most = products.clamp(min=0) + _RESOLVED * errors
        return self.variances[0] / most

    def conflict(self) -> Conflict | None:
        """Return the clearest conflict between noise levels, or None if none is resolved.

        Single bins are compared with each other, and so are all bins up to one with all bins from
        another on.
        """
        ranges, is_pair = _ranges(self._rows - 1)
        if self.count < _LEAST_MEASUREMENTS or not bool(is_pair.any()):
            return None
        bins = torch.arange(self._rows - 1)
        members = torch.stack([(start <= bins) & (bins < stop) for start, stop in ranges]).double()

        def between(mean: Tensor) -> Tensor:
            return members @ self._products(mean)[1:, 1:] @ members.mT

        is_known = self._is_above_noise(between)
        cosines, errors = self._moments.function(lambda mean: _cosines(between(mean)))
        is_told = is_pair & is_known[:, None] & is_known & (cosines < 0)
        z = torch.where(is_told, cosines / errors, torch.inf)
        first, second = divmod(int(z.argmin()), len(ranges))
        threshold = torch.special.ndtri(torch.tensor(_FALSE_ALARMS / int(is_pair.sum())))
        if z[first, second] > threshold:
            return None
        cosine, error = float(cosines[first, second]), float(errors[first, second])
        return Conflict(ranges[first], ranges[second], cosine, error)

    def state(self) -> dict[str, Tensor]:
        """Return tensors, as a checkpoint keeps them."""
        return self._moments.state()

    @property
    def _is_resolved(self) -> Tensor:
        return self._is_above_noise(self._products)

    def _is_above_noise(self, products: Callable[[Tensor], Tensor]) -> Tensor:
        found, errors = (x.diagonal() for x in self._moments.function(products))
        return found > _RESOLVED * errors

    def _products(self, mean: Tensor) -> Tensor:
        i, j = self._upper
        upper = mean.new_zeros(self._rows, self._rows).index_put((i, j), mean[: len(i)])
        return upper + upper.triu(1).mT

    def _variances(self, mean: Tensor) -> Tensor:
        return mean[self._upper.shape[1] :]


def _ranges(count: int) -> tuple[list[_Range], Tensor]:
    """Return ranges of bins, and which two of them are compared, the lower one first."""
    ranges = [(i, i + 1) for i in range(count)]
    ranges += [(0, stop) for stop in range(2, count)]
    ranges += [(start, count) for start in range(1, count - 1)]
    starts, stops = torch.tensor(ranges, dtype=torch.long).reshape(-1, 2).unbind(1)
    return ranges, stops[:, None] <= starts


def _cosines(products: Tensor) -> Tensor:
    # a negative estimate of a norm is unresolved, and must not spoil the errors of others
    squares = products.diagonal()
    norms = torch.where(squares > 0, squares, 1.0).sqrt()
    return products / (norms[:, None] * norms)


def _known(values: Tensor, is_known: Tensor) -> Tensor:
    return torch.where(is_known, values, torch.nan)
