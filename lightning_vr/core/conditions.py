"""What a network is conditioned on beside a class label, with a row for each sample.

A condition is a dictionary of the network's arguments: tensors ``(B, *)``, or dictionaries of these
to any depth, as ``added_cond_kwargs`` of diffusers' models. A tensor of one row is for all samples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.rows import mapped, rows_at

Condition = dict[str, Any]


def expanded(cond: Any, count: int, device: torch.device | None = None) -> Condition:
    """Return a condition with ``count`` rows in each tensor, which share memory with one row.

    Args:
        cond: The condition, with one row or ``count``.
        count: Number of samples.
        device: Where the tensors are to be, or None for where they are.

    Raises:
        ValueError: If it is no dictionary of such tensors, with the name of the first that is none.
    """
    if not isinstance(cond, dict):
        raise ValueError(
            f"`cond` must be a dictionary of the network's arguments, got {type(cond).__name__}: "
            f"name them, as in {{'text': embeddings}}."
        )

    def rows(name: str, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"`cond` must hold tensors, got {type(x).__name__} as {name!r}: make it "
                f"one of a row for each sample."
            )
        found = len(x) if x.ndim else None
        if found not in (1, count):
            raise ValueError(
                f"`cond` must have one row, or {count} as there are samples, got "
                f"{'none' if found is None else found} in {name!r}: give each sample its row."
            )
        return x.to(device).expand(count, *x.shape[1:])

    return _mapped(cond, rows)


def condition_rows(cond: Condition | None, index: Any) -> Condition | None:
    """Return the rows of a condition at ``index``, a slice or positions ``(n,)``."""
    return None if cond is None else rows_at(cond, index)


def replaced(cond: Condition, null: Condition, where: Tensor) -> Condition:
    """Return a condition whose rows are those of another one in some places.

    Args:
        cond: A condition of B rows.
        null: One of the same names, of one row or B.
        where: Whether each row is replaced ``(B,)``, bool.
    """

    def rows(name: str, x: Tensor, other: Tensor) -> Tensor:
        return torch.where(where.reshape(-1, *(1,) * (x.ndim - 1)), other.to(x), x)

    return _mapped(cond, rows, null)


def null_condition(null: Any, cond: Condition) -> Condition:
    """Return what stands for no condition, in the form of ``cond``, with one row.

    Args:
        null: ``"zeros"``, or a dictionary of the names of ``cond``, of tensors, numbers or lists of
            numbers, with or without an axis of one row.
        cond: A condition.

    Raises:
        ValueError: If the names or the shapes are not those of ``cond``.
    """
    if null == "zeros":
        return mapped(cond, lambda x: torch.zeros_like(x[:1]))

    def rows(name: str, x: Tensor, given: Any) -> Tensor:
        try:
            found = torch.as_tensor(given).to(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`null_cond` must hold tensors or numbers, got {given!r} as {name!r}: give "
                f"numbers, or 'zeros'."
            ) from error
        shape = (1, *x.shape[1:])
        if found.ndim and found.shape not in (shape, shape[1:]):
            raise ValueError(
                f"`null_cond` must have the shape {shape[1:]} of a row of {name!r}, got "
                f"{tuple(found.shape)}: give one row, or 'zeros'."
            )
        return found.expand(shape)

    return _mapped(cond, rows, null)


def _mapped(
    cond: Condition, function: Callable[..., Tensor], *others: Condition, path: str = ""
) -> Condition:
    """Return a condition with every tensor replaced by ``function(name, tensor, ...)``."""
    for other in others:
        if not isinstance(other, dict) or other.keys() != cond.keys():
            names = sorted(other) if isinstance(other, dict) else type(other).__name__
            raise ValueError(
                f"`null_cond` must have the names of the condition{path and f' {path!r}'}, "
                f"{sorted(cond)}, got {names}: name each of them, or use 'zeros'."
            )
    found: Condition = {}
    for name, x in cond.items():
        full = f"{path}.{name}" if path else str(name)
        rest = [other[name] for other in others]
        if isinstance(x, dict):
            found[name] = _mapped(x, function, *rest, path=full)
        else:
            found[name] = function(full, x, *rest)
    return found
