"""What estimators have learned, as it was before a batch that an error may undo.

An estimator learns while a batch is trained on. A batch that an error ends is taken again after a
resume, and must not be learned from twice.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_vr.estimators.slot import SLOTS


class LearnedState:
    """Keeps what the slots of a module have learned."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def keep(self, module: LightningModule) -> None:
        """Keep the state of the slots, by their names in a checkpoint."""
        self.kept = {
            f"{slot}.{name}._extra_state".replace("..", "."): _copy(part.get_extra_state())
            for slot in SLOTS
            if isinstance(root := getattr(module, slot, None), nn.Module)
            for name, part in root.named_modules()
            if type(part).get_extra_state is not nn.Module.get_extra_state
        }


def _copy(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {name: _copy(value) for name, value in state.items()}
    return state
