"""What is said of a part of a checkpoint that is not what it must be."""

from typing import Any

import torch
from torch import Tensor


def damaged(name: str, allowed: str, got: Any, path: Any) -> ValueError:
    """Return the error for a part of a checkpoint that is not what it must be."""
    what = "nothing" if got is None else shown(got)
    return ValueError(
        f"`{name}` in the checkpoint {path} must be {allowed}, got {what}: the file is damaged or "
        f"another program has written it, use another checkpoint."
    )


def shown(value: Any) -> str:
    """Return a value in a few words."""
    if isinstance(value, Tensor):
        kind = "meta " if value.is_meta else "" if value.layout == torch.strided else "sparse "
        return f"a {kind}tensor of shape {tuple(value.shape)}"
    if isinstance(value, (int, float, str)):
        return repr(value)[:60]
    return f"a {type(value).__name__}"
