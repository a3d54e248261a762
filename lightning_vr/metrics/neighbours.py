"""Distances to nearest neighbours among many points, in blocks of bounded memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

_ENTRIES = 4_000_000
"""Distances that are held at a time."""


def nearest_distances(points: Tensor, others: Tensor, rank: int = 1) -> Tensor:
    """Return the distance of each of ``points (n, f)`` to its nearest of ``others (m, f)``.

    Args:
        points: Where distances are measured from.
        others: Where they are measured to; a point that is among them is its own first neighbour.
        rank: Which neighbour, from 1 for the nearest on.

    Returns:
        ``(n,)``, float64.
    """
    found = [rows.kthvalue(rank, dim=1).values for rows in distance_rows(points, others)]
    return torch.cat(found)


def distance_rows(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield the Euclidean distances of some points at a time to all others, float64.

    A point is at distance 0 of its copy: they are not taken from squares, which would cancel.
    """
    points, others = wide(points), wide(others)
    for rows in torch.split(points, max(1, _ENTRIES // len(others))):
        yield torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def wide(features: Tensor) -> Tensor:
    """Return features in float64, on the CPU where their device has none."""
    return features.to("cpu" if features.device.type == "mps" else features.device).double()
