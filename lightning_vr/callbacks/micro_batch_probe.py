"""Gradient variance of any module from the micro-batches and ranks of an ordinary run."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_vr.callbacks.gradient_probes import GradientProbe, with_total
from lightning_vr.core.batches import batch_size
from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_reduce_sum, world_size
from lightning_vr.lifecycle.precision import unscales_itself
from lightning_vr.variance.components import Components, two_batch_sizes


class MicroBatchProbe(GradientProbe):
    """Reads the gradients of micro-batches and ranks off an ordinary run."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(trainer, module)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._norms: list[tuple[int, Tensor]] = []
        self._size = 0
        self._sizes: list[int] = []
        self._handles: list[RemovableHandle] = [
            parameter.register_hook(self._hook(group))  # type: ignore[no-untyped-call]
            for parameter, group in zip(self._parameters, self.groups, strict=True)
        ]

    def before_any_batch(self, batch: Any) -> None:
        self._size = batch_size(batch)

    def before_backward(self) -> None:
        self._sizes.append(self._size)

    def before_optimizer_step(self) -> Components:
        norms, sizes = self._norms, self._sizes or [0]
        self._norms, self._sizes = [], []
        accumulation = int(self.trainer.accumulate_grad_batches)
        squares = (accumulation / self.loss_scale) ** 2 * self._by_group(norms)
        is_even = set(sizes) == {sizes[0]} and len(sizes) == accumulation
        local = torch.tensor([sizes[0], sizes[0] ** 2, is_even], device=squares.device).to(squares)

        everyone = all_reduce_sum(torch.cat([squares, local]))
        squares, (size, squared_size, even) = everyone[:-3], everyone[-3:]
        count, ranks = accumulation * world_size(), world_size()
        square_of_mean = self._by_group(self._norms_of_mean())
        found = two_batch_sizes(squares / count, square_of_mean, count, sizes[0])

        # the last window of an epoch may be short; its batches do not compare
        counts = (count > 1) & (even == ranks) & (ranks * squared_size == size**2)
        return Components(*(torch.where(counts, x, torch.nan) for x in with_total(found)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, group: int) -> Callable[[Tensor], None]:
        def keep_norm(gradient: Tensor) -> None:
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            self._norms.append((group, norm))

        return keep_norm

    def _norms_of_mean(self) -> list[tuple[int, Tensor]]:
        """Return the norms of the optimizer's gradient, which is not clipped yet."""
        norms = [
            (group, torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
            for parameter, group in zip(self._parameters, self.groups, strict=True)
            if parameter.grad is not None
        ]
        if unscales_itself(self.trainer.optimizers[0]):
            norms = [(group, norm / self.loss_scale) for group, norm in norms]
        return norms

    def _by_group(self, norms: list[tuple[int, Tensor]]) -> Tensor:
        """Return sums of squared norms within groups, in float64 on the device: no step waits."""
        device = self.module.device
        sums = torch.zeros(len(self.names), dtype=widest_float(device), device=device)
        if not norms:
            return sums
        index = torch.tensor([group for group, _ in norms], device=sums.device)
        return sums.index_add(0, index, torch.stack([norm for _, norm in norms]).to(sums) ** 2)
