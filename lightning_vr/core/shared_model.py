"""A frozen model that copies of its owner have in common, as it never changes.

It is no part of the module that holds it, so that it is neither trained, averaged nor saved, and
keeps its dtype and mode whatever becomes of its owner. It follows the device of a tensor that its
owner moves: a buffer that is not saved.
"""

from typing import Any

import torch

from lightning_vr.core.devices import device_of


class SharedModel:
    """Holds a model beside the parts of a module.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._device = device_of(model)

    def on(self, device: torch.device) -> Any:
        """Return the model, moved to a device if it was elsewhere."""
        if self._device != device:
            self.model = self.model.to(device)
            self._device = device_of(self.model)
        return self.model

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedModel":
        return self
