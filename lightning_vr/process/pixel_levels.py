"""Pixels as numbers: ``levels`` values that are evenly spaced in [-1, 1], 256 for 8 bits."""

from torch import Tensor

from lightning_vr.core.validation import check_integer


def check_levels(levels: int | None) -> None:
    """Raise if a number of levels is neither None, for continuous data, nor 2 or more."""
    if levels is not None:
        check_integer("levels", levels, 2)


def check_on_levels(x0: Tensor, levels: int | None) -> None:
    """Raise if samples are no pixels of so many values; None takes any samples.

    Raises:
        ValueError: If a number is between two levels, or outside of [-1, 1].
    """
    if levels is None:
        return
    step = 2 / (levels - 1)
    numbers = (x0 + 1) / step
    if not bool((numbers - numbers.round()).abs().max() < 0.01 and x0.abs().max() < 1 + step / 100):
        raise ValueError(
            f"`levels` must be the number of values that pixels have in [-1, 1], but samples are "
            f"not on such a grid, got {levels}: correct it, or leave it out for data that is "
            f"continuous or encoded."
        )
