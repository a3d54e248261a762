"""The gradient of a mean over many rows, chunk by chunk, in the memory of one chunk.

Forward and backward passes alternate, so that activations of one chunk exist at a time, whatever
the number of rows. The gradients by the parameters, and by the tensors that the rows were made of,
are computed before ``backward`` is called; the returned loss passes them on when it is. So what
works on an ordinary loss works on this one: accumulation, DDP, clipping, loss scaling, and one
backward pass through an upstream network on the averaged cotangent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lightning_vr.core.rows import Rows, in_chunks, leaves, mapped, row_count, tensors
from lightning_vr.core.sharded_gradients import sharded_gradients
from lightning_vr.core.sharding import is_sharded
from lightning_vr.core.types import Clean


class Chunks(nn.Module):
    """Losses of rows and the gradient of their mean, chunk by chunk.

    It is a module, so that ``functional_call`` replaces its parameters in the backward pass too,
    in which checkpointed activations are computed again.

    Args:
        module: The module that the losses depend on.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        function: Callable[[Rows], Tensor],
        rows: Rows,
        inputs: list[Tensor],
        chunk: int,
        scale: float,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return losses ``(n,)`` and gradients of their mean.

        Args:
            function: From rows to their losses ``(n,)``, or to terms of these ``(n, k)``, by
                the module.
            rows: n rows.
            inputs: What to differentiate by.
            chunk: Rows at a time.
            scale: Factor on the loss while it is differentiated.
        """
        count = row_count(rows)
        losses: list[Tensor] = []
        gradients: list[Tensor | None] = [None] * len(inputs)
        for part in in_chunks(rows, chunk):
            found = function(part)
            losses.append(found.detach())
            scaled = found.sum() * (scale / count)
            # as the trainer's backward is: parts of a network in float32 stay in float32
            with torch.autocast(scaled.device.type, enabled=False):
                parts = torch.autograd.grad(scaled, inputs, allow_unused=True)
            gradients = [_sum(a, b) for a, b in zip(gradients, parts, strict=True)]
        return torch.cat(losses), [None if g is None else g / scale for g in gradients]


def mean_in_chunks(
    module: nn.Module,
    function: Callable[[Rows], Tensor],
    rows: Rows,
    chunk: int,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of rows, which can be differentiated once, and the loss of each.

    Where the function returns terms ``(n, k)`` of losses, these are returned.

    Args:
        module: The module whose trainable parameters the loss depends on.
        function: From rows to their losses ``(n,)`` or terms ``(n, k)``, by ``module``.
        rows: n rows; tensors among them that require a gradient get one.
        chunk: Rows at a time.
        scale: Factor on the loss while it is differentiated: float16 needs one.
    """
    if not torch.is_grad_enabled():
        per_draw = torch.cat([function(part) for part in in_chunks(rows, chunk)])
        return per_draw.sum() / len(per_draw), per_draw
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sources = [x for x in leaves(rows) if x.requires_grad]
    if is_sharded(module):
        per_draw, gradients = sharded_gradients(module, function, rows, chunk, scale=scale)
    else:
        aliases = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        per_draw, gradients = gradients_in_chunks(
            module, function, rows, chunk, aliases=aliases, scale=scale
        )
    loss: Tensor = _WithGradient.apply(  # type: ignore[no-untyped-call]
        per_draw.sum() / len(per_draw), gradients, *parameters.values(), *sources
    )
    return loss, per_draw


def gradients_in_chunks(
    module: nn.Module,
    function: Callable[[Rows], Tensor],
    rows: Rows,
    chunk: int,
    *,
    aliases: dict[str, Tensor],
    buffers: dict[str, Tensor] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the losses of rows and the gradients of their mean, without ``.grad`` or hooks.

    Args:
        module: The module that the losses depend on.
        function: From rows to their losses ``(n,)``, by ``module``.
        rows: n rows.
        chunk: Rows at a time.
        aliases: Replacements of the module's trainable parameters, by name.
        buffers: Replacements of its buffers, if any.
        scale: Factor on the loss while it is differentiated.

    Returns:
        Losses ``(n,)``, and gradients by the aliases and by those of the rows that require one.

    Raises:
        ValueError: If the module checkpoints activations by reentrant passes, which have no such
            gradients.
    """
    rows = mapped(rows, lambda x: x.detach().requires_grad_(x.requires_grad))
    inputs = [*aliases.values(), *(x for x in leaves(rows) if x.requires_grad)]
    state = {f"module.{name}": x for name, x in (aliases | (buffers or {})).items()}
    arguments: Any = (function, rows, inputs, chunk, scale)
    try:
        found: tuple[Tensor, list[Tensor | None]] = functional_call(
            Chunks(module), state, arguments
        )
    except RuntimeError as error:
        if "heckpoint" in str(error) and ".grad()" in str(error):
            raise ValueError(
                "`use_reentrant` of torch.utils.checkpoint must be False where gradients are taken "
                "chunk by chunk or by pilots, got True: pass use_reentrant=False, or set "
                "`chunk_size=None` and avoid CARV('auto') and TaylorCV."
            ) from error
        raise
    return found


def mean_gradients(
    module: nn.Module,
    function: Callable[[Rows], Tensor],
    rows: Rows,
    chunk: int,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Return losses, and gradients of their mean; parameters and buffers stay as they are.

    Arguments are those of ``gradients_in_chunks``. Sharded parameters have the gradients of the
    mean over all ranks, which must all call it.

    Returns:
        Losses ``(n,)``, the gradient by each trainable parameter in order, zero where there is
        none, and gradients by those of the rows that require one.
    """
    parameters, buffers = aliases(module)
    if is_sharded(module):
        losses, found = sharded_gradients(module, function, rows, chunk, scale=scale)
    else:
        for parameter in parameters.values():
            parameter.requires_grad_()
        losses, found = gradients_in_chunks(
            module, function, rows, chunk, aliases=parameters, buffers=buffers, scale=scale
        )
    own = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(found, parameters.values(), strict=False)
    ]
    return losses, own, found[len(own) :]


class _WithGradient(torch.autograd.Function):
    """A number whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "The loss of draws in chunks can be differentiated only once, as its gradient is "
                "not kept: compute the loss again."
            )
        return None, None, *(None if g is None else g * cotangent for g in gradients)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return total
    # the gradients of a sum's terms may be one tensor
    return part.clone() if total is None else total.add_(part)


def parameter_groups(module: nn.Module) -> tuple[list[str], list[int]]:
    """Part the trainable parameters by the first name in which they differ.

    Returns:
        Names of the groups in the order of the network, and the group of each parameter.
    """
    paths = [name.split(".") for name, p in module.named_parameters() if p.requires_grad]
    if not paths:
        raise ValueError(
            f"`module` must have trainable parameters, got a {type(module).__name__} without any: "
            f"set `requires_grad` on some."
        )
    depth = 0
    while len({tuple(path[: depth + 1]) for path in paths}) == 1 and len(paths[0]) > depth + 1:
        depth += 1
    names = [path[min(depth, len(path) - 1)] for path in paths]
    order = list(dict.fromkeys(names))
    return order, [order.index(name) for name in names]


def aliases(loss: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return trainable parameters as fresh leaves on the same memory, and copies of buffers."""
    parameters = {n: p.detach() for n, p in loss.named_parameters() if p.requires_grad}
    return parameters, {name: buffer.clone() for name, buffer in loss.named_buffers()}


def is_trained(clean: Clean) -> bool:
    """Return whether the upstream that made samples is trained with the network."""
    return any(x.requires_grad for x in leaves(tensors(clean)) if isinstance(x, Tensor))
