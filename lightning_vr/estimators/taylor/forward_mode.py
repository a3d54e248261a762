"""A context in which networks have forward-mode derivatives that can be differentiated again.

It replaces operations that fail in torch 2.13: fused attention has no such derivatives, those of
layer normalisation are wrong from the second order on (also by the parameters), and group
normalisation fails on tangents that are not contiguous, which attention returns. Autocast ignores
tensors with a tangent, so derivatives are computed in float32. Compiled networks run uncompiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_vr.core.devices import uncompiled


@contextmanager
def forward_mode(device: torch.device) -> Iterator[None]:
    """Replace operations whose forward-mode derivatives are missing or wrong.

    Args:
        device: Where the network runs.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast(device.type, enabled=False),
        uncompiled(),
        _Normalisations(),
    ):
        yield


class _Normalisations(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        if func is functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias
