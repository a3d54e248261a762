"""Grids: decreasing noise levels s = sigma/alpha from the largest to the smallest, without 0.

The polynomial grid is equally spaced in ``s^(1/rho)`` (Karras et al. 2022, arXiv 2206.00364,
equation 5), the exponential one in log s, which is to say in the log signal-to-noise ratio
``-2 log s``. Any other may be given.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_vr.core.validation import check_choice
from lightning_vr.process.schedules import Schedule

GridKind = Literal["polynomial", "exponential"]

LARGEST_NOISE_LEVEL = 1000.0
"""Where a grid begins if a schedule goes on for ever."""

_ROUNDING = 1e-4
"""Relative error of a bound that was copied from a table."""


def bounds(schedule: Schedule) -> tuple[float, float]:
    """Return the smallest and the largest noise level of a schedule."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    lowest, highest = schedule.noise_level(ends).tolist()
    return lowest, highest


def spaced(
    kind: GridKind, steps: int, rho: float, low: float | None, high: float | None, of: Schedule
) -> Tensor:
    """Return ``steps`` noise levels, float64.

    Args:
        kind: How they are spaced.
        steps: Their number.
        rho: Exponent of the polynomial grid.
        low: The smallest one; the schedule's if None.
        high: The largest one; the schedule's if None, at most 1000.
        of: The schedule.

    Raises:
        ValueError: If the bounds are not 0 < low < high, or outside the schedule's.
    """
    lowest, highest = bounds(of)
    low = lowest if low is None else low
    high = min(highest, LARGEST_NOISE_LEVEL) if high is None else high
    named = "`noise_level_min` and `noise_level_max`"
    if not 0 < low < high:
        raise ValueError(
            f"{named} must satisfy 0 < min < max, got {low:g} and {high:g}: leave one of them out, "
            f"or change it."
        )
    check_within(named, low, high, of)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if kind == "exponential":
        return high * (low / high) ** ramp
    inverse = 1 / rho
    grid: Tensor = (high**inverse + ramp * (low**inverse - high**inverse)) ** rho
    return grid


def given(levels: Sequence[float], schedule: Schedule) -> Tensor:
    """Return levels as a tensor, float64.

    Raises:
        ValueError: If they are outside the schedule's.
    """
    check_within("The noise levels of `grid`", levels[-1], levels[0], schedule)
    return torch.tensor(levels, dtype=torch.float64)


def check_within(named: str, low: float, high: float, schedule: Schedule) -> None:
    """Raise if noise levels are none of the schedule's.

    Args:
        named: What they are.
        low: The smallest of them.
        high: The largest of them.
        schedule: The schedule.

    Raises:
        ValueError: If one is outside its bounds.
    """
    lowest, highest = bounds(schedule)
    if not lowest * (1 - _ROUNDING) <= low <= high <= highest * (1 + _ROUNDING):
        raise ValueError(
            f"{named} must lie between {lowest:g} and {highest:g}, the noise levels of "
            f"{type(schedule).__name__}, got {low:g} and {high:g}: leave them out, or widen the "
            f"schedule."
        )


def check_grid(grid: Any) -> None:
    """Raise if a setting is neither the name of a grid nor a grid.

    Raises:
        ValueError: If it is another name, or levels that do not fall to above 0.
    """
    if isinstance(grid, str):
        check_choice("grid", grid, ("polynomial", "exponential"))
        return
    falls = all(low < high for high, low in pairwise(grid))
    if len(grid) < 2 or not falls or not 0 < grid[-1] < grid[0] < math.inf:
        raise ValueError(
            f"`grid` must be 'polynomial', 'exponential' or two or more decreasing noise levels "
            f"above 0, got {grid}: leave out the final 0."
        )
