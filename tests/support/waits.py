"""What makes the host wait for a device: operations that on a CPU can be seen too."""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
_INDEXING = {"index", "index_put", "index_put_"}


class Waits(TorchDispatchMode):
    """Notes where numbers are read, and shapes that hang on data.

    ``lightning_vr.core.devices.host_waits`` must say so of the CPU: else code may read at will.
    """

    def __init__(self):
        super().__init__()
        self.names, self.places = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in _INDEXING else ()
        is_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
        if name in _READS or is_mask:
            self.names.append(name)
            self.places.append(f"{name}: {traceback.format_stack(limit=4)}")
        return func(*args, **(kwargs or {}))
