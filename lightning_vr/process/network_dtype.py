"""A network whose weights have another dtype than the one in which networks are built."""

from typing import Literal

import torch
from torch import nn

from lightning_vr.core.validation import check_choice

NetworkDtype = Literal["float32", "bfloat16", "float16", "float64"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class InDtype(nn.Module):
    """The network that it is given, with its weights in a dtype.

    A configuration builds networks in float32. This one is for others: its instance is the network
    itself, so that weights keep their names. Samples and conditions are given to the network in its
    dtype; times, the loss and what estimators compute stay in float32 or better.

    Args:
        network: The network; it is changed.
        dtype: The dtype of its weights.
    """

    def __new__(cls, network: nn.Module, dtype: NetworkDtype) -> nn.Module:  # type: ignore[misc]
        check_choice("dtype", dtype, tuple(DTYPES))
        # not by a method of the network's own: diffusers' warns of parts that it has not
        return nn.Module.to(network, DTYPES[dtype])


def dtype_name(network: nn.Module) -> str | None:
    """Return the name of the dtype that all weights of a network have, None if it has no weights.

    Raises:
        ValueError: If they have several, or another one.
    """
    kinds = {x.dtype for x in network.parameters() if x.is_floating_point()}
    names = [name for name, kind in DTYPES.items() if kind in kinds]
    if len(kinds) > 1 or len(names) < len(kinds):
        raise ValueError(f"weights have the dtypes {', '.join(sorted(map(str, kinds)))}")
    return names[0] if names else None
