"""What is known of Lightning's ``WeightAveraging``: which weights are trained, which are averages.

Lightning's checkpoint calls the module's weights those that train, and the callback's their
average. The callback swaps the two for a validation run, and at the end of training it replaces the
first by the second: a checkpoint of such a moment would resume from the average.

All uses of its private attributes are here (``_average_model``, ``_swap_models``,
``_copy_average_to_current``; seen in Lightning 2.6).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lightning_vr.estimators.slot import SLOTS

_TRAINED = "current_model_state"
"""Where a checkpoint keeps the weights that train, if ``state_dict`` holds their average."""


class AveragedWeights:
    """Tracks whether weights that train or their average are in place, for checkpoints."""

    def __init__(self) -> None:
        self._are_swapped = False
        self._replaced: dict[str, Tensor] = {}

    def watch(self, trainer: Trainer) -> None:
        """Track what the callbacks of a trainer do; call it when a fit begins."""
        self._are_swapped, self._replaced = False, {}
        for callback in _averaging(trainer):
            self._watch(callback)

    def restore_training_weights(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the raw weights where Lightning restores from, whatever weights are in place."""
        averaged, trained = checkpoint["state_dict"], checkpoint.get(_TRAINED)
        if trained is None:
            return
        for name in _weights(module).keys() & averaged.keys():
            if self._are_swapped:
                averaged[name], trained[name] = trained[name], averaged[name]
            elif name in self._replaced:
                trained[name] = self._replaced[name]

    def _watch(self, callback: WeightAveraging) -> None:
        kind, patched = type(callback), cast(Any, callback)

        def swap(module: LightningModule) -> None:
            kind._swap_models(callback, module)
            self._are_swapped = not self._are_swapped

        def replace(module: LightningModule) -> None:
            # a device may have no room for a copy
            self._replaced = {
                name: x.detach().to("cpu", copy=True) for name, x in _weights(module).items()
            }
            kind._copy_average_to_current(callback, module)

        patched._swap_models, patched._copy_average_to_current = swap, replace


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Put the weights of a ``WeightAveraging`` callback into ``module``, once it has averaged any.

    Call it where the callback does not swap them in itself: outside of validation epochs.
    """
    ready = [
        callback
        for callback in _averaging(trainer)
        if callback._average_model is not None and bool(callback._average_model.n_averaged > 0)
    ][:1]
    for callback in ready:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in ready:
            callback._swap_models(module)


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint that training would go on from, not their average."""
    weights: dict[str, Any] = checkpoint.get(_TRAINED, checkpoint["state_dict"])
    return weights


def update_weights(checkpoint: dict[str, Any], values: dict[str, Any]) -> None:
    """Put values into a checkpoint, beside the weights that train and beside their average."""
    for weights in ("state_dict", _TRAINED):
        if weights in checkpoint:
            checkpoint[weights].update(values)


def keep_learned(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint of averaged weights hold what the slots have learned, which is no weight.

    ``WeightAveraging`` averages tables as if they were weights, and leaves the rest as it was at
    the start.

    Args:
        checkpoint: A module's checkpoint, after its callbacks.
    """
    trained = trained_weights(checkpoint)
    learned = {name: x for name, x in trained.items() if name.split(".")[0] in SLOTS}
    checkpoint["state_dict"].update(learned)


def _averaging(trainer: Trainer) -> list[WeightAveraging]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
