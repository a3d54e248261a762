"""The call of a network by its convention, and what it returns.

A network may return twice the channels that it takes: the first half is what it predicts, and the
second is about the variance of the reverse process (Nichol and Dhariwal 2021, 2102.09672).
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_vr.core.devices import dtype_of
from lightning_vr.process.calling_conventions import NetworkCall
from lightning_vr.process.packed_latents import unpack

_SHAPE_ERROR = re.compile(
    "shapes cannot be multiplied|to have .* channels, but got|[Ss]izes? of tensors? .*must match|"
    "Expected .* input to conv|Given normalized_shape|Kernel size can't be greater"
)
"""Torch raises a plain ``RuntimeError`` for shapes, as for a bug whose traceback is wanted."""


class NetworkOutput(NamedTuple):
    """What a network returns.

    Attributes:
        mean: What it predicts ``(B, *)``, in the shape of its input.
        variance: Its output about the variance of the reverse process ``(B, *)``, or None.
    """

    mean: Tensor
    variance: Tensor | None = None


def class_labels(group: Tensor | None, t: Tensor, num_classes: int | None) -> Tensor | None:
    """Return the labels that a network embeds ``(B,)``: the last one stands for dropped labels.

    Args:
        group: Class labels ``(B,)``, negative where dropped; None if all are.
        t: Times ``(B,)``.
        num_classes: Number of classes; None for no labels.
    """
    if num_classes is None:
        return None
    if group is None:
        return torch.full_like(t, num_classes, dtype=torch.int64)
    return group.long().masked_fill(group < 0, num_classes)


def call_network(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
) -> NetworkOutput:
    """Call a network by its convention, in its own dtype.

    Args:
        network: The network.
        x: Scaled samples ``(B, *)``.
        t: Timesteps ``(B,)`` in the range of a thousand.
        labels: Class labels ``(B,)``, or None.
        cond: Further arguments: tensors, or dictionaries of these.

    Raises:
        ValueError: If an argument is missing or is none, or if it does not take the shape of ``x``
            or returns another shape.
    """
    call, dtype = NetworkCall.of(network), dtype_of(network)
    given = _cast(cond or {}, dtype)
    if labels is not None:
        given["class_labels"] = labels
    call.check(given)
    places, names = call.arguments(x.to(dtype), t, given)
    try:
        output = network(*places, **names)
    except RuntimeError as error:
        if not _SHAPE_ERROR.search(str(error)):
            raise
        raise ValueError(
            f"`network` must take samples of shape {tuple(x.shape[1:])}{_with_shapes(cond)}, but "
            f"{type(network).__name__} does not ({str(error).splitlines()[0]}): build it for the "
            f"shape of the data, or choose other data or another `shape` of samples."
        ) from error
    except IndexError as error:
        # an embedding's own words; of a later batch, as to check each would wait for the device
        if labels is None or "index out of range in self" not in str(error):
            raise
        raise ValueError(
            f"`label` must be below the number of classes that {type(network).__name__} embeds, "
            f"got labels of up to {int(labels.max())} ({error}): fix the labels, or embed more."
        ) from error
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    assert isinstance(output, Tensor)
    if call.convention == "Flux":
        output = unpack(output, *x.shape[-2:])
    return _parts(output, x, type(network).__name__)


def _with_shapes(cond: Mapping[str, Any] | None) -> str:
    """Return the shapes of conditions, of which one may be what the network does not take."""
    tensors = {name: x for name, x in (cond or {}).items() if isinstance(x, Tensor)}
    shapes = ", ".join(f"`{name}` of shape {tuple(x.shape[1:])}" for name, x in tensors.items())
    return f" with the condition {shapes}" if shapes else ""


def _cast(given: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found[name] = _cast(value, dtype)
        else:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            found[name] = value.to(dtype) if is_float else value
    return found


def _parts(output: Tensor, x: Tensor, name: str) -> NetworkOutput:
    """Return a network's output, parted in two where it has twice the channels of ``x``."""
    if output.shape == x.shape:
        return NetworkOutput(output)
    count = x.shape[1] if x.ndim > 1 else 0
    if output.shape == (len(x), 2 * count, *x.shape[2:]):
        return NetworkOutput(*output.chunk(2, dim=1))
    raise ValueError(
        f"`network` must return the shape of its input, {tuple(x.shape)}, or twice the channels, "
        f"got {tuple(output.shape)} from {name}: give it as many output as input channels."
    )
