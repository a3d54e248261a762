"""Which weights train, where a ``WeightAveraging`` callback has put their average in place.

Lightning saves the module's weights as those that train, and the callback's as their average. It
exchanges the two for a validation run, and at the end of training replaces the first by the second:
a checkpoint of such a moment would resume from the average.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lightning_vr.estimators.slot import SLOTS


class AveragedWeights:
    """Keeps track of where the weights that train are, and puts checkpoints right."""

    def __init__(self) -> None:
        self._are_exchanged = False
        self._replaced: dict[str, Tensor] = {}

    def watch(self, trainer: Trainer) -> None:
        """Note from now on what the callbacks of a trainer do; call it when a fit begins."""
        self._are_exchanged, self._replaced = False, {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                self._watch(callback)

    def restore_training_weights(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what trains as that, whatever is in place."""
        averaged, trained = checkpoint["state_dict"], checkpoint.get("current_model_state")
        if trained is None:
            return
        for name in _weights(module).keys() & averaged.keys():
            if self._are_exchanged:
                averaged[name], trained[name] = trained[name], averaged[name]
            elif name in self._replaced:
                trained[name] = self._replaced[name]

    def _watch(self, callback: WeightAveraging) -> None:
        kind, patched = type(callback), cast(Any, callback)

        def exchange(module: LightningModule) -> None:
            kind._swap_models(callback, module)
            self._are_exchanged = not self._are_exchanged

        def replace(module: LightningModule) -> None:
            # not on the device, which may have no room
            self._replaced = {
                name: x.detach().to("cpu", copy=True) for name, x in _weights(module).items()
            }
            kind._copy_average_to_current(callback, module)

        patched._swap_models, patched._copy_average_to_current = exchange, replace


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Put the weights of a ``WeightAveraging`` callback into ``module``, once it has averaged any.

    Call it where the callback does not have them in place itself: outside of validation epochs.
    """
    averaging = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging)
        and callback._average_model is not None
        and bool(callback._average_model.n_averaged > 0)
    ]
    for callback in averaging[:1]:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in averaging[:1]:
            callback._swap_models(module)


def keep_learned(checkpoint: dict[str, Any]) -> None:
    """Give a checkpoint of averaged weights what the slots have learned, unaveraged.

    ``WeightAveraging`` averages buffers of the slots as if they were weights, and leaves their
    other state as it was at the start.

    Args:
        checkpoint: A module's checkpoint, after its callbacks.
    """
    current = checkpoint.get("current_model_state", {})
    names = [name for name in current if name.split(".")[0] in SLOTS]
    checkpoint["state_dict"].update({name: current[name] for name in names})
