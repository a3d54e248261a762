"""Measuring the components of gradient variance, per sample or by differences of batches.

Two methods fill the nested design of ``variance.components`` and agree in expectation:

* **per sample**: the gradient of each draw by ``vmap(grad)``, in chunks. A unit is one sample, so
  that a few dozen draws are enough. It needs a network that functorch can batch, and draws that do
  not depend on each other. Compiled networks run uncompiled.
* **by differences**: ordinary backward passes of whole batches with common random numbers. A unit
  is a batch. It takes any architecture and any estimator, and includes what a batch shares: drawn
  references, strata, batch normalisation, checkpointing.

Which of them to use is decided in ``variance.nested_measurement``. Both differentiate aliases of
the parameters: nothing is accumulated into ``.grad``, and no hook of the user, of DDP or of an
optimizer fires. Buffers are copies. Memory is a few times the number of parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_vr.core.devices import uncompiled
from lightning_vr.core.distributed import world_size
from lightning_vr.core.gradients import aliases, is_trained, mean_gradients
from lightning_vr.core.rng import preserve_global_rng, set_global_rng
from lightning_vr.core.rows import (
    Rows,
    concatenated,
    interleaved,
    leaves,
    row_count,
    rows_at,
)
from lightning_vr.core.sharding import is_sharded, local
from lightning_vr.core.types import Clean, Times
from lightning_vr.variance.components import DRAWS_PER_UNIT, Components
from lightning_vr.variance.gradient_sums import GradientSums

Source = Callable[..., torch.Generator]
"""Gives the generator of a key: ``source("noise", 0) -> torch.Generator``."""

_Part = tuple[Clean, tuple[int | str, ...], float, float]
"""Samples, the key of their draws, and the quantiles of t between which these are."""

_CHUNK_ELEMENTS = 1 << 26
"""Per-sample gradients at a time, 256 MB in float32; more only if four draws need more."""


class NoisyLoss(nn.Module, ABC):
    """A loss whose times and noise can be drawn again, one by one, for the same data.

    It holds the module that it differentiates as a child, and maps rows to their losses.
    """

    @property
    def couples_rows(self) -> bool:
        """Whether the losses of a batch share randomness, which single draws do not show."""
        return False

    def chunk(self, rows: int, device: torch.device) -> int:
        """Return how many rows pass through the network at a time on a device."""
        return rows

    @abstractmethod
    def times(self, clean: Clean, source: torch.Generator, low: float, high: float) -> Times:
        """Draw times between two quantiles of their density."""

    @abstractmethod
    def draw(self, clean: Clean, times: Times, source: torch.Generator) -> Rows:
        """Draw noise, and all else that is random, at given times; without gradient."""

    @abstractmethod
    def forward(self, rows: Rows) -> Tensor:
        """Return the loss of each row ``(n,)``."""


class GradientMeasurement:
    """Measures the components of the gradient variance of a loss.

    Args:
        loss: The loss to differentiate.
        source: Gives generators by key, different ones on each rank.
        groups: For each trainable parameter, in order, the part of the gradient that it is in.

    Attributes:
        loss_scale: Factor on the loss, by which gradients are divided again: in float16 small
            gradients are zero without one.
    """

    def __init__(self, loss: NoisyLoss, source: Source, groups: Sequence[int]) -> None:
        self.loss = loss
        self.source = source
        self.groups = groups
        self.loss_scale = 1.0

    def per_sample(
        self, clean: Clean, *key: int | str, low: float = 0.0, high: float = 1.0
    ) -> Components:
        """Return components per draw from per-sample gradients, each sample of ``clean`` a unit.

        Args:
            clean: n >= 2 samples; 4 n gradients are taken.
            *key: Distinguishes the draws of this measurement from others.
            low: Quantile of the density of t above which times are drawn.
            high: Quantile below which times are drawn.

        Returns:
            The whole gradient first, then each group: tensors ``(1 + groups,)``.
        """
        return self._per_sample([(clean, key, low, high)], key)[0]

    def per_sample_by_level(self, clean: Clean, count: int, *key: int | str) -> list[Components]:
        """Return what ``per_sample`` does for each of ``count`` equally likely bins of t.

        Each bin has samples of its own, and all gradients are taken together, which is faster than
        bin by bin.

        Args:
            clean: n samples, 2 or more for each bin.
            count: Number of bins.
            *key: Distinguishes the draws of this measurement from others.
        """
        size = len(clean.x0) // count
        parts: list[_Part] = [
            (
                clean.rows(slice(i * size, (i + 1) * size)),
                (*key, i),
                i / count,
                (i + 1) / count,
            )
            for i in range(count)
        ]
        return self._per_sample(parts, key)

    def _per_sample(self, parts: list["_Part"], key: tuple[int | str, ...]) -> list[Components]:
        for clean, *_ in parts:
            _check_units(len(clean.x0))
        with preserve_global_rng(), uncompiled(), sdpa_kernel(SDPBackend.MATH):
            rows = concatenated([interleaved(self._draws(*part)) for part in parts])
            parameters, fixed = aliases(self.loss)
            set_global_rng(self.source(*key, "global"))

            def one(parameters: dict[str, Tensor], row: Rows) -> Tensor:
                losses: Tensor = functional_call(self.loss, (parameters, fixed), (row,))
                return losses.sum().mul(self.loss_scale)

            gradients = vmap(grad(one), in_dims=(None, 0), randomness="different")
            sums = [GradientSums(self.groups) for _ in parts]
            size = DRAWS_PER_UNIT * len(parts[0][0].x0)
            chunk = _chunk(sum(p.numel() for p in parameters.values()))
            for start, stop in _slices(len(parts), size, chunk):
                part = rows_at(rows, (slice(start, stop), None))
                with SameTensors():
                    taken = gradients(parameters, part)
                found = self._unscaled(taken.values())
                for first in range(0, stop - start, size):
                    own = sums[(start + first) // size]
                    own.add([gradient[first : first + size] for gradient in found])
            return [each.components() for each in sums]

    def by_differences(
        self, batches: Sequence[Clean], *key: int | str, low: float = 0.0, high: float = 1.0
    ) -> Components:
        """Return components per sample from gradients of batches, each batch a unit.

        Args:
            batches: Two or more batches of equal size, each of other samples.
            *key: Distinguishes the draws of this measurement from others.
            low: Quantile of the density of t above which times are drawn.
            high: Quantile below which times are drawn.

        Returns:
            The whole gradient first, then each group: tensors ``(1 + groups,)``. Of an estimator
            with several draws of each sample it is the variance per sample, not per draw.
        """
        _check_units(len(batches))
        sharded = is_sharded(self.loss)
        # a unit of sharded gradients is a batch of all ranks
        size = len(batches[0].x0) * (world_size() if sharded else 1)
        sums = GradientSums(self.groups, is_sharded=sharded)
        with preserve_global_rng():
            for unit, clean in enumerate(batches):
                draws = self._draws(clean, (*key, unit), low, high)
                passes = [self.gradient(rows, *key, unit, draw) for draw, rows in enumerate(draws)]
                sums.add([torch.stack([*map(local, x)]) for x in zip(*passes, strict=True)])
        return sums.components().scaled(size)

    def gradient_between(
        self, clean: Clean, *key: int | str, low: float = 0.0, high: float = 1.0
    ) -> list[Tensor]:
        """Return the gradient of the mean loss of a batch, at times between two quantiles.

        Args:
            clean: The batch.
            *key: Distinguishes the draws of this gradient from others.
            low: Quantile of the density of t above which times are drawn.
            high: Quantile below which times are drawn.

        Returns:
            For each trainable parameter, in order, its gradient.
        """
        with torch.set_grad_enabled(is_trained(clean)):
            times = self.loss.times(clean, self.source(*key, "times"), low, high)
            rows = self.loss.draw(clean, times, self.source(*key, "noise"))
        return self.gradient(rows, *key)

    def gradient(self, rows: Rows, *key: int | str) -> list[Tensor]:
        """Return the gradient of the mean loss of rows, for each trainable parameter in order.

        Rows that an upstream in training has made hand their gradient on to its parameters.
        """
        set_global_rng(self.source(*key, "global"))
        chunk = self.loss.chunk(row_count(rows), leaves(rows)[0].device)
        _, own, by_rows = mean_gradients(self.loss, self.loss, rows, chunk, scale=self.loss_scale)
        upstream = self._upstream(rows, by_rows)
        return [a if b is None else a + b for a, b in zip(own, upstream, strict=True)]

    def why_unavailable(self, clean: Clean) -> str | None:
        """Return why per-sample gradients are impossible or incomplete, or None."""
        if is_sharded(self.loss):
            return "the weights are sharded"
        if is_trained(clean):
            return "`encode` is trained"
        if self.loss.couples_rows:
            return "the draws of a batch depend on each other"
        if len(self.loss.times(clean, self.source("why_unavailable"), 0.0, 1.0).t) != len(clean.x0):
            return "there are several draws of each sample"
        for name, module in self.loss.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                return f"{name.partition('.')[2]} normalises over the batch"
        try:
            self.per_sample(clean.rows(slice(0, 2)), "why_unavailable")
        except Exception as error:  # whatever a network's own code raises
            reason = str(error).strip().splitlines() or [type(error).__name__]
            return f"functorch says: {reason[0]}"
        return None

    def _upstream(self, rows: Rows, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return gradients of the parameters that have made the rows."""
        sources = [x for x in leaves(rows) if x.requires_grad]
        pairs = [(x, g) for x, g in zip(sources, cotangents, strict=True) if g is not None]
        if not pairs:
            return [None] * len(self.groups)
        if is_sharded(self.loss):
            raise ValueError(
                "`encode` must not be trained where gradients of sharded weights are measured: "
                "leave GradientVariance and CARV('auto') out, or train with 'ddp'."
            )
        parameters = [p for p in self.loss.parameters() if p.requires_grad]
        outputs, given = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, parameters, given, retain_graph=True, allow_unused=True)

    def _draws(
        self, clean: Clean, key: tuple[int | str, ...], low: float, high: float
    ) -> list[Rows]:
        """Return the four draws of each unit: two times, two noises for each."""
        rows = []
        with torch.set_grad_enabled(is_trained(clean)):
            for i in range(2):
                times = self.loss.times(clean, self.source(*key, "times", i), low, high)
                for j in range(2):
                    rows.append(self.loss.draw(clean, times, self.source(*key, "noise", i, j)))
        return rows

    def _unscaled(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        if self.loss_scale == 1:
            return list(gradients)
        return [gradient / self.loss_scale for gradient in gradients]


class SameTensors(TorchFunctionMode):
    """Makes ``x.to(...)`` return x where nothing changes, also inside functorch.

    There it returns a wrapper. Some modules keep it as an attribute, such as diffusers' schedulers:
    it outlives the measurement and can neither be copied nor saved.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is not Tensor.to or (kwargs or {}).get("copy"):
            return found
        is_same = (found.device, found.dtype) == (args[0].device, args[0].dtype)
        return args[0] if is_same else found


def _chunk(size: int) -> int:
    """Return how many per-sample gradients of ``size`` numbers to hold: those of whole units."""
    return DRAWS_PER_UNIT * max(1, _CHUNK_ELEMENTS // (DRAWS_PER_UNIT * size))


def _slices(parts: int, size: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield where chunks of rows begin and end: parts of ``size`` rows, or pieces of one."""
    step = chunk // size * size or chunk
    ends = size * parts if chunk >= size else size
    for begin in range(0, size * parts, ends):
        for start in range(begin, begin + ends, step):
            yield start, min(start + step, begin + ends)


def _check_units(count: int) -> None:
    if count < 2:
        raise ValueError(
            f"Components of variance need at least 2 samples or batches, got {count}: measure on "
            f"more."
        )
