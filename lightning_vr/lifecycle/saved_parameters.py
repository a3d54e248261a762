"""The parameters of a module by the names of its checkpoints.

These differ from ``named_parameters``: a parameter that several parts share has a name for each of
them, and a hook may rename what ``torch.compile`` has wrapped.
"""

from collections.abc import Callable

from torch import Tensor, nn


def saved_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that ``state_dict`` has for them, shared ones by all."""
    state = module.state_dict(keep_vars=True)
    return {name: x for name, x in state.items() if isinstance(x, nn.Parameter)}


def for_each(
    parameters: dict[str, nn.Parameter], function: Callable[[str, nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    """Return what a function makes of each parameter and a name of it, by all of its names."""
    made = {id(p): function(name, p) for name, p in once(parameters).items()}
    return {name: made[id(p)] for name, p in parameters.items()}


def once(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return each parameter by the first of its names alone."""
    first: dict[int, str] = {}
    for name, p in parameters.items():
        first.setdefault(id(p), name)
    return {name: parameters[name] for name in first.values()}
