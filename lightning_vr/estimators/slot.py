"""A slot's state in a checkpoint, which may have been written with another estimator in it."""

from typing import Any

from torch import Tensor, nn

SLOTS = ("draws", "target", "control_variate")


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
