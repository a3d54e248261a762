"""Adaptive steps of Dormand and Prince through torchdiffeq, with an error in words."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def dormand_prince(
    slope: Callable[[Tensor, Any], Any],
    start: Any,
    span: Tensor,
    rtol: float,
    atol: float,
    options: dict[str, Any] | None = None,
) -> Any:
    """Return the states at the times ``span``, of an ODE that begins at ``start`` at the first.

    Args:
        slope: The state's derivative, of the time and the state.
        start: The state: a tensor, or a tuple of them.
        span: Times.
        rtol: Relative tolerance of each step.
        atol: Absolute tolerance of each step.
        options: As torchdiffeq takes them.

    Raises:
        ValueError: If no step is short enough for the tolerances.
    """
    # it imports scipy, which takes longer than all of this package
    from torchdiffeq import odeint

    try:
        return odeint(slope, start, span, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:
        raise ValueError(
            f"Tolerances must be within what steps can reach, got rtol={rtol:g} and atol={atol:g}, "
            f"for which no step is short enough ({error}): the network is too rough there, or not "
            f"finite. Train it, use larger tolerances, or a solver of fixed steps."
        ) from error
