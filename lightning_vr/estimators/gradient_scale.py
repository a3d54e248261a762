"""A network as it is, whose parameters' gradients are scaled group by group."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.types import Noised
from lightning_vr.estimators.loss import Network


def with_scaled_gradients(network: Network, scales: Sequence[float]) -> Network:
    """Return a network of the same output, whose gradient is multiplied group by group.

    Args:
        network: A method of a module; its groups are those of ``parameter_groups``.
        scales: Factor for each group.

    Raises:
        ValueError: If ``network`` is no method of a module.
    """
    module = getattr(network, "__self__", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"Argument `network` expected to be a method of an nn.Module, whose parameters can be "
            f"told apart, but got {network!r}: pass one, or leave out `by_group`."
        )
    groups = iter(parameter_groups(module)[1])
    scaled = {
        f"module.{name}": p.detach() + scales[next(groups)] * (p - p.detach())
        for name, p in module.named_parameters()
        if p.requires_grad
    }

    def call(x: Tensor, noised: Noised) -> Tensor:
        output: Tensor = functional_call(_Caller(module), scaled, (network, x, noised))
        return output

    return call


class _Caller(nn.Module):
    """Calls a function while ``functional_call`` stands in for the parameters of its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)
