"""Compiled networks where the compiler cannot follow."""

from contextlib import AbstractContextManager
from typing import Any

import torch


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled networks as they were written.

    Of functorch's transforms and of forward mode the compiler gives up on a network, and from then
    on it leaves that network's code alone wherever it is called, training included.
    """
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
