"""Losses whose times and noise can be drawn again: of a ``Diffusion``, and of any other module.

They are what ``variance.gradient_measurement`` needs to know of a model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_vr.core.rows import Rows, tensors
from lightning_vr.core.types import Clean, Times
from lightning_vr.estimators.draws import open_uniform
from lightning_vr.process.timesteps import Density, Truncated
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.variance.given_loss import LossFunction, given_loss, sees_conditions
from lightning_vr.variance.gradient_measurement import NoisyLoss

Corruption = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""``(x0 (B, *), t (B,), generator) -> corruption (B, *)``, such as the mask of each token."""

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context that the trainer runs forward passes in."""


class DiffusionLoss(NoisyLoss):
    """The training loss of a ``Diffusion``, with its own draws, target and control variate.

    Args:
        module: The model.
        precision: The trainer's precision.
    """

    def __init__(self, module: Diffusion, precision: Precision = nullcontext) -> None:
        super().__init__()
        self.module = module
        self.precision = precision

    @property
    def couples_rows(self) -> bool:  # type: ignore[override]
        """Whether a slot shares randomness within a batch."""
        return self.module.draws.couples_rows or self.module.target.couples_rows

    def chunk(self, rows: int, device: torch.device) -> int:
        return self.module.draws.chunk(rows, device)

    def times(self, clean: Clean, source: torch.Generator, low: float, high: float) -> Times:
        objective = self.module.objective.between(low, high)
        return self.module.draws.times(clean, objective, source)

    def draw(self, clean: Clean, times: Times, source: torch.Generator) -> Rows:
        with self.precision():
            noised, target = self.module.draw(clean, source, times=times)
        return {"noised": tensors(noised), "target": tensors(target)}

    def forward(self, rows: Rows, *, in_terms: bool = False) -> Tensor:
        """Return losses ``(n,)``, or the terms that they are the sums of ``(n, k)``."""
        with self.precision():
            return (self.module.loss_terms if in_terms else self.module.per_draw_losses)(rows)


class GivenLoss(NoisyLoss):
    """A per-sample loss that a function computes with a module.

    Args:
        module: The module to differentiate.
        function: ``(module, x0, noise, t) -> loss of each sample (B,)``, or with ``clean`` as its
            last argument (``variance.given_loss``).
        timesteps: Density of t.
        precision: The trainer's precision.
        corruption: Draws what the function gets as ``noise``; standard normal noise without it.
    """

    def __init__(
        self,
        module: LightningModule,
        function: LossFunction,
        timesteps: Density,
        precision: Precision = nullcontext,
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.function = function
        self.timesteps = timesteps
        self.precision = precision
        self.corruption = corruption

    def times(self, clean: Clean, source: torch.Generator, low: float, high: float) -> Times:
        u = open_uniform(len(clean.x0), source)
        t = Truncated(self.timesteps, low, high)(u).to(torch.float32)
        return Times(t, torch.ones_like(t))

    def draw(self, clean: Clean, times: Times, source: torch.Generator) -> Rows:
        rows = tensors(clean) if sees_conditions(self.function) else {"x0": clean.x0}
        noise = self._noise(clean.x0, times.t, source)
        return {"clean": rows, "noise": noise, "t": times.t}

    def _noise(self, x0: Tensor, t: Tensor, source: torch.Generator) -> Tensor:
        if self.corruption is None:
            return torch.randn(x0.shape, generator=source, device=x0.device, dtype=x0.dtype)
        noise = self.corruption(x0, t, source)
        if not isinstance(noise, Tensor) or noise.shape[:1] != x0.shape[:1]:
            found = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(
                f"`draw` must return a tensor with one row for each of the {len(x0)} samples, got "
                f"{found}: draw the corruption of all samples at once."
            )
        return noise

    def forward(self, rows: Rows) -> Tensor:
        clean = Clean(**rows["clean"])
        with self.precision():
            return given_loss(self.function, self.module, clean, rows["noise"], rows["t"])
