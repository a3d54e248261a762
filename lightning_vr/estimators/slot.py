"""A slot's state in a checkpoint, which may have been written with another estimator in it."""

from typing import Any

from torch import Tensor, nn

SLOTS = ("draws", "target", "control_variate")
"""Names of the slots of a module."""


class Slot(nn.Module):
    """What stands in a slot of a DiffusionModule: draws, a target or a control variate.

    What it learns while training is in the checkpoint. A checkpoint of another estimator leaves it
    as it is: to change estimators in the middle of training is no mismatch of weights.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = self.state_dict(prefix=prefix)
        saved = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        if _shapes(saved) != _shapes(own):
            for name in saved:
                del state_dict[name]
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def keep_learned(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint of averaged weights hold what the slots have learned, which is no weight.

    ``WeightAveraging`` averages tables as if they were, and leaves the rest as it was at the start.

    Args:
        checkpoint: A module's checkpoint, after its callbacks.
    """
    current = checkpoint.get("current_model_state", {})
    names = [name for name in current if name.split(".")[0] in SLOTS]
    checkpoint["state_dict"].update({name: current[name] for name in names})


def drop_control_variate(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Leave out, before a module without a control variate loads a state, what one has learned."""
    if module.control_variate is None:
        for name in [n for n in state_dict if n.startswith(f"{prefix}control_variate.")]:
            del state_dict[name]


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of tensors by name, those within an extra state as well."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        parts = value if isinstance(value, dict) else {"": value}
        tensors = {part: x.shape for part, x in parts.items() if isinstance(x, Tensor)}
        found[name] = type(value), tensors
    return found
