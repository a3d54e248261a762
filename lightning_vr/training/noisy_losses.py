"""Losses whose times and noise can be drawn again: of modules with draws, and of any other.

They are what ``variance.gradient_measurement`` needs to know of a model.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call

from lightning_vr.core.gradients import mean_in_chunks
from lightning_vr.core.rows import Rows, leaves, row_count, tensors
from lightning_vr.core.types import Clean, LossEstimate, Noised, TargetEstimate, Times
from lightning_vr.estimators.draws import open_uniform
from lightning_vr.process.timesteps import Density, Truncated
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.variance.given_loss import LossFunction, given_loss, sees_conditions
from lightning_vr.variance.gradient_measurement import NoisyLoss

Corruption = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""``(x0 (B, *), t (B,), generator) -> corruption (B, *)``, such as the mask of each token."""

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context that the trainer runs forward passes in."""


class DrawnLoss(NoisyLoss):
    """The loss of a module that has ``draws`` and an ``objective``.

    Args:
        module: The module.
        precision: The trainer's precision.
    """

    def __init__(self, module: nn.Module, precision: Precision = nullcontext) -> None:
        super().__init__()
        self.module: Any = module
        self.precision = precision

    @property
    def couples_rows(self) -> bool:
        """Whether a slot shares randomness within a batch."""
        return bool(self.module.draws.couples_rows)

    def chunk(self, rows: int, device: torch.device) -> int:
        return int(self.module.draws.chunk(rows, device))

    def times(self, clean: Clean, source: torch.Generator, low: float, high: float) -> Times:
        objective = self.module.objective.between(low, high)
        times: Times = self.module.draws.times(clean, objective, source)
        return times

    @abstractmethod
    def observe(self, clean: Clean, source: torch.Generator) -> None:
        """Show the draws what they would see in a training step, without gradient.

        Args:
            clean: The samples of the step.
            source: Generator of all randomness.
        """


class DiffusionLoss(DrawnLoss):
    """The training loss of a ``Diffusion``, with its own draws, target and control variate.

    Args:
        module: The model.
        precision: The trainer's precision.
    """

    module: Diffusion

    def __init__(self, module: Diffusion, precision: Precision = nullcontext) -> None:
        super().__init__(module, precision)

    @property
    def couples_rows(self) -> bool:
        """Whether a slot shares randomness within a batch."""
        return self.module.draws.couples_rows or self.module.target.couples_rows

    def draw(self, clean: Clean, times: Times, source: torch.Generator) -> Rows:
        with self.precision():
            noised, target = self.module.draw(clean, source, times=times)
        return {"noised": tensors(noised), "target": tensors(target)}

    def forward(self, rows: Rows, *, in_terms: bool = False) -> Tensor:
        """Return losses ``(n,)``, or the terms that they are the sums of ``(n, k)``."""
        with self.precision():
            return (self.module.loss_terms if in_terms else self.module.per_draw_losses)(rows)

    @torch.no_grad()
    def observe(self, clean: Clean, source: torch.Generator) -> None:
        rows = self.draw(clean, self.times(clean, source, 0.0, 1.0), source)
        # statistics of batch normalisation must not change
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        mean, terms = mean_in_chunks(
            self,
            lambda part: functional_call(self, buffers, (part,), {"in_terms": True}),
            rows,
            self.chunk(row_count(rows), leaves(rows)[0].device),
        )
        noised, target = Noised(**rows["noised"]), TargetEstimate(**rows["target"])
        per_draw, control, *bound = terms.unbind(dim=1)
        found = LossEstimate(mean, per_draw, noised, target, control, *bound)
        self.module.draws.observe(found, self.module.objective)


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
