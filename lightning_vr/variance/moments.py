"""Moments: the weighted mean of repeated measurements and its standard error, in float64.

Each measurement is an unbiased estimate; so is their mean, and its error follows from their
scatter. With weights w that do not depend on the values v,

    mean = Σ w v / W,    error² = W₂ / W² · Σ w (v - mean)² / (W - W₂/W),    W = Σ w, W₂ = Σ w².

Sets of measurements merge exactly (Chan, Golub and LeVeque 1979), and older ones fade when their
weights are multiplied by a factor. Ratios are formed from means and never averaged: a denominator,
such as a squared mean gradient, comes close to zero in single measurements.
"""

import torch
from torch import Tensor

from lightning_vr.core.validation import check_saved_tensor


class Moments:
    """Mean and standard error of measurements of one shape; each element has its own weights.

    Args:
        shape: Shape of a measurement.
        state: What ``state`` has returned, or None to start empty.
    """

    def __init__(self, *shape: int, state: Tensor | None = None) -> None:
        if state is not None:
            check_saved_tensor("moments", state, (4, *shape))
        self._state = torch.zeros(4, *shape, dtype=torch.float64) if state is None else state

    def add(self, values: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add one measurement; elements of weight 0, NaN or infinite do not count."""
        values = values.detach().cpu().double()
        weight = torch.as_tensor(weight, dtype=torch.float64, device="cpu").expand_as(values)
        weight = torch.where(values.isfinite(), weight, 0.0)
        values = torch.where(weight > 0, values, 0.0)
        self._merge(torch.stack([weight, weight**2, values, torch.zeros_like(values)]))

    def merge(self, other: "Moments") -> None:
        """Add all measurements of ``other``."""
        self._merge(other._state)

    def fade(self, factor: float | Tensor) -> None:
        """Multiply the weights of all measurements so far by ``factor``."""
        weight, squared, mean, scatter = self._state
        self._state = torch.stack([factor * weight, factor**2 * squared, mean, factor * scatter])

    @property
    def weight(self) -> Tensor:
        """Sum of the weights of each element."""
        return self._state[0]

    @property
    def mean(self) -> Tensor:
        """Weighted mean of each element; NaN where nothing was measured."""
        return torch.where(self._state[0] > 0, self._state[2], torch.nan)

    @property
    def error(self) -> Tensor:
        """Standard error of each mean; NaN with fewer than two measurements."""
        weight, squared, _, scatter = self._state
        freedom = weight - squared / weight
        # of one measurement that has faded this is rounding, not zero
        freedom = torch.where(freedom > 1e-12 * weight, freedom, torch.nan)
        return torch.sqrt(squared / weight**2 * scatter / freedom)

    def state(self) -> Tensor:
        """Return all sums as one tensor."""
        return self._state

    def _merge(self, other: Tensor) -> None:
        weight, squared, mean, scatter = self._state
        more_weight, more_squared, more_mean, more_scatter = other
        total = weight + more_weight
        fraction = torch.where(total > 0, more_weight / total, 0.0)
        shift = more_mean - mean
        self._state = torch.stack(
            [
                total,
                squared + more_squared,
                mean + fraction * shift,
                scatter + more_scatter + weight * fraction * shift**2,
            ]
        )
