"""What is known of Lightning's ``WeightAveraging``: which weights are trained, which are averages.

Which weights count now, ``average_that_counts`` says: those that train until an average of them
exists, which may start late (``update_starting_at_step``), and that average from then on. What a
fit validates, saves and leaves in the module follows it, and so do callbacks that sample.

Lightning's checkpoint calls the module's weights those that train, and the callback's their
average. The callback swaps the two for a validation run, and at the end of training it replaces the
first by the second: a checkpoint of such a moment would resume from the average. And it does all of
that with a copy of the initial weights as well, as long as nothing is averaged.

All uses of its private attributes are here (``_average_model``, ``_swap_models``,
``_copy_average_to_current``, ``_latest_update_step``; also the connector's
``_loaded_checkpoint``; seen in Lightning 2.6).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_vr.core.sharding import whole_weights
from lightning_vr.estimators.slot import SLOTS
from lightning_vr.lifecycle.ema import EMA, Averages, aside
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of

_TRAINED = "current_model_state"
"""Where a checkpoint keeps the weights that train, if ``state_dict`` holds their average."""


def average_that_counts(trainer: Trainer) -> WeightAveraging | None:
    """Return the callback whose average counts now, or None while the module's own weights do.

    Only a fit has an average: afterwards the module holds it.
    """
    return _started(trainer) if trainer.state.fn == TrainerFn.FITTING else None


def _started(trainer: Trainer) -> WeightAveraging | None:
    """Return the callback whose average has begun, or None."""
    for callback in _averaging(trainer):
        average = callback._average_model
        if average is not None and bool(average.n_averaged > 0):
            return callback
    return None


class AveragedWeights:
    """Lets a fit validate, save and keep the weights that count, and resume from those that train.

    It keeps no reference to a callback or a trainer, as copies of a module copy it.

    Attributes:
        are_swapped: Whether the callback has put the averages in place for a validation run.
    """

    def __init__(self) -> None:
        self.are_swapped = False
        self._replaced: dict[str, Tensor] = {}

    def watch(self, trainer: Trainer) -> None:
        """Track what the callback of a trainer does; call it when a fit begins.

        Raises:
            MisconfigurationException: If there are several.
        """
        self.are_swapped, self._replaced = False, {}
        found = _averaging(trainer)
        if len(found) > 1:
            names = ", ".join(type(callback).__name__ for callback in found)
            raise MisconfigurationException(
                f"`callbacks` must hold at most one WeightAveraging, got {names}: leave all but "
                f"one out, as each would swap the weights of the others into training."
            )
        # Lightning counts steps from a checkpoint only later
        is_new = trainer.global_step == 0 and not trainer._checkpoint_connector._loaded_checkpoint
        for callback in found:
            if is_new:
                # of an earlier fit, whose steps it would wait for
                callback._latest_update_step, callback._latest_update_epoch = 0, -1
            self._watch(callback, trainer)

    def complete(self, trainer: Trainer, module: LightningModule, state: dict[str, Any]) -> None:
        """Let a checkpoint hold the weights that count, and those that train.

        The latter stand where Lightning restores from, whatever weights are in place.

        Args:
            trainer: A trainer that is fitting or has fitted.
            module: Its module.
            state: The checkpoint, after the callbacks.
        """
        callback, trained = _started(trainer), state.get(_TRAINED)
        if trained is None:
            if callback is not None and not self.are_swapped and not self._replaced:
                _take_average(state["state_dict"], callback)  # no callback was asked for it
            return
        if callback is None:
            state["state_dict"] = dict(trained)
            return
        if isinstance(callback, EMA):
            return  # it knows which are in place
        averaged = state["state_dict"]
        for name in _weights(module).keys() & averaged.keys():
            if self.are_swapped:
                averaged[name], trained[name] = trained[name], averaged[name]
            elif name in self._replaced:
                trained[name] = self._replaced[name]

    def keep(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the weights that count in a module whose run was over before it began.

        Lightning then calls no hook of the end of training, in which the callback would do so.
        """
        callback = average_that_counts(trainer)
        if callback is not None:
            callback._copy_average_to_current(module)

    def _watch(self, callback: WeightAveraging, trainer: Trainer) -> None:
        kind, patched = type(callback), cast(Any, callback)

        def swap(module: LightningModule) -> None:
            # nothing is averaged while weights are swapped, so that each swap is undone
            if self.are_swapped or average_that_counts(trainer) is callback:
                kind._swap_models(callback, module)
                self.are_swapped = not self.are_swapped

        def replace(module: LightningModule) -> None:
            if average_that_counts(trainer) is not callback:
                return
            if not isinstance(callback, EMA):
                self._replaced = {name: aside(x) for name, x in _weights(module).items()}
            kind._copy_average_to_current(callback, module)

        def load(*args: Any) -> None:
            # outside of a fit it would put the weights that train in place of their average
            if trainer.state.fn == TrainerFn.FITTING:
                kind.on_load_checkpoint(callback, *args)

        average: Any = callback._average_model
        if isinstance(average, AveragedModel):
            average.__dict__["update_parameters"] = partial(_update, average)
        patched._swap_models, patched._copy_average_to_current = swap, replace
        patched.on_load_checkpoint = load


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Put the weights that count into ``module``, whole on each rank; all ranks enter it.

    Call it where the callback does not swap them in itself: outside of validation epochs.
    """
    callback = average_that_counts(trainer)
    if callback is not None:
        callback._swap_models(module)
    try:
        with whole_weights(module):
            yield
    finally:
        if callback is not None:
            callback._swap_models(module)


@contextmanager
def weights_that_count(module: LightningModule) -> Iterator[None]:
    """Put the weights that count into a module of a run, whatever the run does at the moment.

    Args:
        module: A ``ResumableModule``, which knows whether the callback has swapped them in already.
    """
    trainer, averages = module._trainer, getattr(module, "_averages", None)
    is_running = trainer is not None and trainer.state.status == TrainerStatus.RUNNING
    if not is_running or averages is None or averages.are_swapped:
        yield
        return
    assert trainer is not None
    with averaged_weights(trainer, module):
        yield


def load_what_trains(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a fit without ``WeightAveraging`` go on from the weights that train, not an average.

    Args:
        trainer: The trainer of the fit.
        checkpoint: The checkpoint, before Lightning loads its weights.
    """
    if not _averaging(trainer):
        checkpoint["state_dict"] = trained_weights(checkpoint)


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint that training would go on from, not their average."""
    weights: dict[str, Any] = checkpoint.get(_TRAINED, checkpoint["state_dict"])
    return weights


def is_averaged(trainer: Trainer) -> bool:
    """Return whether a fit saves averaged weights, and leaves its module with them."""
    return _started(trainer) is not None


def update_weights(checkpoint: dict[str, Any], values: dict[str, Any]) -> None:
    """Put values into a checkpoint, beside the weights that train and beside their average."""
    for weights in ("state_dict", _TRAINED):
        if weights in checkpoint:
            checkpoint[weights].update(values)


def drop_weights(checkpoint: dict[str, Any], names: Iterable[str]) -> None:
    """Leave weights out of a checkpoint, and out of their average."""
    for weights in ("state_dict", _TRAINED):
        for name in names if weights in checkpoint else ():
            checkpoint[weights].pop(name, None)


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
    return [each for each in callbacks_of(trainer) if isinstance(each, WeightAveraging)]


def _update(average: Any, module: torch.nn.Module) -> None:
    """Average a module's weights; those that do not train would be rounded."""
    type(average).update_parameters(average, module)
    for own, weight in zip(average.module.parameters(), module.parameters(), strict=True):
        if not weight.requires_grad:
            own.detach().copy_(weight.detach())


def _take_average(weights: dict[str, Any], callback: WeightAveraging) -> None:
    """Replace weights by their average, but not what the slots have learned."""
    average: Any = callback._average_model
    is_ours = isinstance(average, Averages)
    found = average.weights[0] if is_ours else _weights(average.module)
    for name, value in found.items():
        if name in weights and name.split(".")[0] not in SLOTS:
            weights[name] = value.detach().to(weights[name].dtype)


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by the names of checkpoints."""
    state = module.state_dict(keep_vars=True)
    return {name: x for name, x in state.items() if isinstance(x, Tensor)}
