"""A slot's state in a checkpoint, which may have been written with another estimator in it."""

import logging
from typing import Any

from torch import Tensor, nn

from lightning_vr.core.distributed import rank

log = logging.getLogger(__name__)

SLOTS = ("draws", "target", "control_variate")
"""Names of the slots of a DiffusionModule."""


class Slot(nn.Module):
    """An estimator in a slot of a DiffusionModule: draws, a target or a control variate.

    What it learns while training is in the checkpoint. It also loads a checkpoint that was written
    with another estimator in its slot, because users may change estimators in the middle of
    training: it warns, and stays as it was built.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = self.state_dict(prefix=prefix)
        saved = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        if _layout(saved) != _layout(own):
            for name in saved:
                del state_dict[name]
            state_dict.update(own)
            own_name = type(self).__name__
            dropped = "what that one learned is dropped, and " if saved else ""
            warn_of_dropped_state(
                f"{own_name}: the checkpoint was written with a different estimator or proposal in "
                f"this slot: {dropped}{own_name} starts as it was built."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def warn_of_dropped_state(message: str) -> None:
    """Warn on rank 0 that a checkpoint's learned state does not fit and is not loaded."""
    if rank() == 0:
        log.warning(message)


def drop_control_variate(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Leave out a control variate's state before a module without one loads a checkpoint."""
    names = [name for name in state_dict if name.startswith(f"{prefix}control_variate.")]
    if module.control_variate is None and names:
        for name in names:
            del state_dict[name]
        warn_of_dropped_state(
            "`control_variate` is None, but the checkpoint was written with one: what that one "
            "learned is dropped."
        )


def _layout(state: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of tensors, and the keys of dictionaries, by name.

    What else differs in a dictionary is for the ``set_extra_state`` that reads it: it can say why.
    """
    found: dict[str, Any] = {}
    for name, value in state.items():
        keys = set(value) if isinstance(value, dict) else None
        found[name] = value.shape if isinstance(value, Tensor) else (type(value), keys)
    return found
