"""Mean and covariance of repeated measurements of several numbers, for functions of their means.

A function f of means, such as a cosine, has the standard error of the delta method,

    error² = ∇f(mean)ᵀ Cov(mean) ∇f(mean),    Cov(mean) = W₂ / W² · S / (W - W₂ / W),

with the weighted scatter S, W = Σ w and W₂ = Σ w², as in ``variance.moments``. It is right to first
order: f of means has a bias of order 1/n, where the mean of f over measurements would keep its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.validation import check_saved_tensor


class JointMoments:
    """Weighted mean and scatter matrix of vectors, in float64 on the CPU.

    Args:
        size: Numbers in a measurement.
        state: What ``state`` has returned, or None to start empty.
    """

    def __init__(self, size: int, state: Any = None) -> None:
        shapes = {"weights": (2,), "mean": (size,), "scatter": (size, size)}
        if state is None:
            state = {name: torch.zeros(*s, dtype=torch.float64) for name, s in shapes.items()}
        for name, shape in shapes.items():
            found = state.get(name) if isinstance(state, dict) else state
            check_saved_tensor(f"joint moments' {name}", found, shape)
        self._weights, self.mean, self._scatter = (state[name] for name in shapes)

    def add(self, values: Tensor, memory: float = 1.0) -> None:
        """Add a measurement ``(size,)``.

        Args:
            values: What was measured, finite.
            memory: Factor on the weight of all earlier ones.
        """
        values = values.detach().cpu().double()
        before = memory * self._weights[0]
        shift = values - self.mean
        self._weights = self._weights * torch.tensor([memory, memory**2]).double() + 1
        self.mean = self.mean + shift / self._weights[0]
        spread = before / self._weights[0] * torch.outer(shift, shift)
        self._scatter = memory * self._scatter + spread

    @property
    def count(self) -> float:
        """Effective number of measurements, ``W² / W₂``."""
        weight, squared = self._weights.tolist()
        return weight**2 / squared if squared else 0.0

    @property
    def covariance(self) -> Tensor:
        """Covariance matrix of the mean; NaN with fewer than two measurements."""
        weight, squared = self._weights
        freedom = weight - squared / weight
        freedom = torch.where(freedom > 1e-12 * weight, freedom, torch.nan)
        found: Tensor = squared / weight**2 * self._scatter / freedom
        return found

    def function(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return a function of the mean and its standard error.

        Args:
            function: From the mean ``(size,)`` to a tensor of any shape.
        """
        gradient: Tensor = torch.func.jacrev(function)(self.mean)
        variance = torch.einsum("...i,ij,...j->...", gradient, self.covariance, gradient)
        return function(self.mean), variance.clamp(min=0).sqrt()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"weights": self._weights, "mean": self.mean, "scatter": self._scatter}
