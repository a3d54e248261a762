"""Gradient variance of any module from its training step on both halves of a batch."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_vr.callbacks.gradient_probes import GradientProbe, ProbeResult, with_total
from lightning_vr.core.batches import batch_size, take_rows
from lightning_vr.core.rng import preserve_global_rng, set_global_rng
from lightning_vr.variance.components import two_batch_sizes


class HalfBatchProbe(GradientProbe):
    """Runs the training step of a copy of the module on both halves of a batch.

    The copy shares the weights' memory and nothing else: metrics, buffers and lists of the module
    stay as they are, and what the copy logs goes nowhere.
    """

    cost = 1.0

    def prepare(self, batch: Any) -> None:
        """Raise if the module cannot be copied or the batch cannot be halved."""
        if batch_size(batch) < 2:
            raise MisconfigurationException(
                "GradientVariance needs two samples in a batch, or gradient accumulation, got a "
                "batch of 1: use a larger batch or `accumulate_grad_batches` of 2 or more."
            )
        try:
            self._copy()
        except Exception as error:
            raise MisconfigurationException(
                f"GradientVariance cannot copy this {type(self.module).__name__} to measure on it "
                f"({error}): pass `loss`, or train with `accumulate_grad_batches` of 2 or more."
            ) from error

    def before_batch(self, batch: Any, batch_idx: int, number: int) -> ProbeResult | None:
        half = batch_size(batch) // 2
        if half == 0:
            return None
        with preserve_global_rng():
            module = self._copy()
            halves = [take_rows(batch, i * half, (i + 1) * half) for i in range(2)]
            first, second = (
                self._gradient(module, part, batch_idx, i) for i, part in enumerate(halves)
            )
        if first is None or second is None:
            return None
        mean_square = 0.5 * (self._dot(first, first) + self._dot(second, second))
        product = self._dot(first, second)
        found = two_batch_sizes(mean_square, 0.5 * (mean_square + product), 2, half)
        return with_total(found), {}

    def _copy(self) -> LightningModule:
        shared: dict[int, Any] = {id(self.trainer): self.trainer}
        for parameter in self.module.parameters():
            alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            shared[id(parameter)] = alias
        with _CopyOfValues():
            module = copy.deepcopy(self.module, shared)
        kind = type(module)
        silent: dict[str, Any] = {"logger": DummyLogger(), "loggers": [], "print": _nothing}
        silent |= {"log": _nothing, "log_dict": _nothing}
        module.__class__ = type(kind.__name__, (kind,), silent)
        return module

    def _gradient(
        self, module: LightningModule, batch: Any, batch_idx: int, half: int
    ) -> list[Tensor] | None:
        set_global_rng(self.source("half", half))
        arguments = [batch]
        if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
            arguments.append(batch_idx)
        with self.trainer.precision_plugin.train_step_context():
            output = module.training_step(*arguments)
        loss: Any = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:  # Lightning skips such a batch
            return None
        parameters = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.loss_scale * loss, parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g / self.loss_scale
            for g, p in zip(found, parameters, strict=True)
        ]

    def _dot(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        for group, x, y in zip(self.groups, a, b, strict=True):
            sums[group] += float(x.flatten().float() @ y.flatten().float())
        return sums


class _CopyOfValues(TorchFunctionMode):
    """Copies values where ``deepcopy`` refuses tensors with a graph, such as losses in a list."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))


def _nothing(*_: Any, **__: Any) -> None:
    pass
