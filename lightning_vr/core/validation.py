"""Checks of arguments that many rooms make: each raises and says what is allowed."""

import math
from typing import Any

from torch import Tensor


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise if a number is below the smallest one allowed, or NaN.

    Args:
        name: The argument.
        value: What it is.
        least: The smallest that it may be.

    Raises:
        ValueError: If it is smaller, or no number.
    """
    if not (_is_number(value) and value >= least):
        raise ValueError(f"`{name}` must be at least {least}, got {value!r}: use {least} or more.")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise if a value is no whole number, or below the smallest one allowed.

    Args:
        name: The argument.
        value: What it is.
        least: The smallest that it may be.

    Raises:
        ValueError: If it is no integer of at least ``least``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}, got {value!r}: use {least} or "
            f"more."
        )
    check_at_least(name, value, least)


def check_positive(name: str, value: float) -> None:
    """Raise if a number is not positive and finite.

    Raises:
        ValueError: If it is 0, negative, infinite, NaN or no number.
    """
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(
            f"`{name}` must be positive and finite, got {value!r}: use a number above 0."
        )


def check_finite_number(name: str, value: float) -> None:
    """Raise if a number is infinite or NaN.

    Raises:
        ValueError: If it is.
    """
    if not (_is_number(value) and math.isfinite(value)):
        raise ValueError(f"`{name}` must be finite, got {value!r}: use a finite number.")


def check_fraction(name: str, value: float) -> None:
    """Raise if a number is not between 0 and 1.

    Raises:
        ValueError: If it is outside, or NaN.
    """
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(
            f"`{name}` must be between 0 and 1, got {value!r}: use a number of this range."
        )


def check_instance(name: str, value: Any, kind: type, example: str) -> None:
    """Raise if a value is no object of a class: another object, the class itself, or its name.

    Args:
        name: The argument.
        value: What it is.
        kind: The class that it must be of.
        example: What to use instead.

    Raises:
        ValueError: If it is of another class.
    """
    if not isinstance(value, kind):
        raise ValueError(
            f"`{name}` must be an object of the class {kind.__name__}, got {described(value)}: "
            f"use {example}."
        )


def check_functions(**functions: Any) -> None:
    """Raise if an argument, unless it is None, is no function.

    Raises:
        ValueError: Naming the first that is none.
    """
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise ValueError(
                f"`{name}` must be a function, got {described(value)}: pass one, as a lambda or "
                f"functools.partial."
            )


def described(value: Any) -> str:
    """Return what a wrong value is, in a few words for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise if a value is none of the choices.

    Raises:
        ValueError: Naming the choices.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"`{name}` must be {', '.join(others)} or {last}, got {value!r}.")


def check_samples(name: str, x: Tensor) -> None:
    """Raise if a tensor is no batch of real floating-point samples ``(n, *)``.

    Raises:
        ValueError: If it is complex, of integers, empty, or has no axis but the first.
    """
    if x.is_complex() or not x.is_floating_point():
        raise ValueError(
            f"`{name}` must be a real floating-point tensor, got {x.dtype}: convert it, for "
            f"example with `.float()`."
        )
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(
            f"`{name}` must have shape (n, *) with n of 1 or more and at least one further axis, "
            f"got {tuple(x.shape)}: put samples along the first axis."
        )


def check_finite(name: str, x: Tensor) -> None:
    """Raise if a sample of ``x (n, *)`` holds NaN or infinity.

    Raises:
        ValueError: With the number of such samples and the index of the first.
    """
    broken = (~x.flatten(1).isfinite().all(dim=1)).nonzero()
    if len(broken):
        raise ValueError(
            f"`{name}` must be finite, but {len(broken)} of {len(x)} samples are not, the first "
            f"at index {int(broken[0])}: remove NaN and infinity."
        )


def check_labels(
    name: str, labels: Tensor, num_classes: int | None, count: int | None = None
) -> None:
    """Raise if ``labels (n,)`` are no integers in ``[0, num_classes)``.

    Args:
        name: The argument.
        labels: What it is.
        num_classes: Number of classes.
        count: Number of samples n, if known.

    Raises:
        ValueError: With the number of wrong labels and the first of them.
    """
    if num_classes is None:
        raise ValueError(
            f"`num_classes` must be given with `{name}`, got None: set it to the number of "
            f"classes, or leave `{name}` out."
        )
    shape = (len(labels) if labels.ndim else 1,) if count is None else (count,)
    if labels.shape != shape or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"`{name}` must be integers of shape ({'n' if count is None else count},), one for "
            f"each sample, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"`{name}` must be in [0, {num_classes}), as `num_classes` says, but {len(wrong)} of "
            f"{len(labels)} are not, the first at index {first}, which is {int(labels[first])}: "
            f"{_label_advice(int(labels.min()), int(labels.max()))}."
        )


def check_saved_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise if a part of a saved state is no tensor of a shape.

    Args:
        name: The part.
        value: What it is.
        shape: The shape that it must have.

    Raises:
        ValueError: If it is another.
    """
    found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:60]
    if found != shape:
        raise ValueError(
            f"`{name}` of a saved state must be a tensor of shape {shape}, got {found}: the file "
            f"is damaged or of other settings, use another checkpoint."
        )


def check_one_per_sample(name: str, values: Tensor, count: int) -> None:
    """Raise if what a function has returned is not one number for each of ``count`` samples.

    Raises:
        ValueError: With the shape.
    """
    if values.shape != (count,):
        raise ValueError(
            f"`{name}` must return one number for each of the {count} samples, got a tensor of "
            f"shape {tuple(values.shape)}: average over all dimensions but the first."
        )


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__")


def _label_advice(smallest: int, largest: int) -> str:
    if smallest < 0:  # no number of classes makes them right
        return "number the classes from 0"
    return f"set `num_classes` to {largest + 1} or fix the labels"
