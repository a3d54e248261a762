"""Logits of near-duplicates at low noise, which products in float32 cannot tell apart.

A logit ``(alpha/sigma²) x_t·r - (alpha²/2sigma²) ‖r‖²`` is a small difference of products of the
size of ``s = alpha²‖r‖²/sigma²``, which float32 rounds by about ``eps s``: at norm 55 and noise
0.002 by 90, where two near-duplicates differ by 2. So where ``eps s`` is not small logits are taken
relative to ``‖x_t‖²/2sigma²``, which leaves ``-‖x_t - alpha r‖²/2sigma²``, and those near the
largest are computed again from the differences, which float32 resolves to 1e-4.

A reference is near if its weight could be so large that the error matters: at low noise these are
the own sample and its near-duplicates.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_vr.core import devices

_TOLERANCE = 1e-4
"""Error of a logit, relative to others of its row, that is let be."""

_NEAR, _NEAR_SLOPE = 8.0, 10.0
"""A weight of ``e^-(8 + 10 error)`` or less changes by less than 4e-5, for logits that err by 4."""

_CANDIDATES = 8
"""Number of references of a row and chunk that can be near where the host does not wait."""

_DIFFERENCES = 1 << 16
"""Numbers of the differences that are formed at a time on the CPU, which stay in the cache."""

_ON_ACCELERATOR = 1 << 21
"""The same where each piece costs a launch of every kernel."""


def rough_offset(squared_length: Tensor, curvature: Tensor, dim: int) -> Tensor:
    """Return ``‖x_t‖²/2sigma²`` of the rows whose logits are rounded too much, and 0 of others.

    Args:
        squared_length: ``‖x_t‖²/sigma²``, of which noise alone makes d ``(B,)``.
        curvature: ``alpha²/2sigma²`` ``(B,)``.
        dim: d, the number of entries of a sample.
    """
    allowed = dim + _TOLERANCE / torch.finfo(squared_length.dtype).eps
    return torch.threshold(0.5 * squared_length, 0.5 * allowed, 0).mul_(curvature > 0)


@dataclass(frozen=True)
class NearLogits:
    """Logits of pairs of a query and a reference of a chunk, relative to the query's offset.

    Those that are the largest of their query are among them.

    Attributes:
        rows: Positions of the queries ``(P,)``.
        columns: Positions of the references ``(P,)``.
        values: Logits ``(P,)``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def largest(self, rounded: Tensor) -> Tensor:
        """Return the largest of each query, and of others the ``rounded (B,)`` ones."""
        largest = rounded.index_fill(0, self.rows, -torch.inf)
        return largest.scatter_reduce_(0, self.rows, self.values, "amax")

    def write(self, logits: Tensor, maximum: Tensor) -> None:
        """Write them into ``logits (B, c)``, which are relative to ``maximum (B,)``."""
        logits[self.rows, self.columns] = self.values - maximum[self.rows]


class LowNoiseRows:
    """The queries at low noise, of which the others are left alone.

    Args:
        scaled: ``(alpha/sigma²) x_t``, centred as the references, ``(B, d)``.
        curvature: ``alpha²/2sigma²`` ``(B,)``.
        offset: What ``rough_offset`` returned for them ``(B,)``, which logits are relative to.
    """

    def __init__(self, scaled: Tensor, curvature: Tensor, offset: Tensor) -> None:
        self.offset, self.is_low = offset, offset > 0
        self._scaled, self._curvature = scaled, curvature
        # eps s is twice that of the offset; of other rows nothing is near
        margin = offset * (2 * _NEAR_SLOPE * torch.finfo(offset.dtype).eps) + _NEAR
        self._margin = torch.where(self.is_low, margin, -torch.inf)

    def own_logits(self, rounded: Tensor, samples: Tensor) -> Tensor:
        """Return logits of one sample of each row ``(B, d)``: right ones for ``rounded (B,)``."""
        distances = torch.linalg.vector_norm(self._points().sub_(samples), dim=1)
        return torch.where(self.is_low, -self._curvature * distances.square_(), rounded)

    def near_logits(
        self, logits: Tensor, largest: Tensor, maximum: Tensor, references: Tensor
    ) -> NearLogits | None:
        """Return right logits for those that are near the largest so far, or None.

        Args:
            logits: Rounded logits, not relative to the offsets ``(B, c)``.
            largest: The largest of each row, relative to the offset ``(B,)``.
            maximum: That of earlier chunks ``(B,)``.
            references: The references of the chunk, centred ``(c, d)``.
        """
        floor = torch.maximum(largest, maximum).sub_(self._margin)
        if devices.host_waits(logits.device):
            return self._without_waiting(logits, floor + self.offset, references)
        some = np.flatnonzero((largest > floor).numpy())
        if len(some) == 0:
            return None
        # numpy finds the few three times as fast as torch on one core
        lowest = (floor + self.offset).numpy()[:, None]
        if len(some) == len(logits):
            found = np.flatnonzero(logits.numpy() > lowest)
        else:
            found = np.flatnonzero(logits.numpy()[some] > lowest[some])
        rows, columns = np.divmod(found, logits.shape[1])
        near = torch.from_numpy(some[rows]), torch.from_numpy(columns)
        return NearLogits(*near, self._logits(*near, references))

    def spread(
        self,
        rounded: Tensor,
        mean_logit: Tensor,
        squared_norm: Tensor,
        pivot: Tensor,
        shift: Tensor,
    ) -> Tensor:
        """Return ``E ‖r - mean‖²`` under the weights, ``(B,)``.

        A logit is ``-alpha²‖r - y‖²/2sigma²`` about ``y = x_t/alpha``. Where the mean of that is
        less than a squared norm, the spread about y keeps what it loses about the origin.

        Args:
            rounded: The spread, as it follows from the references' squared norms ``(B,)``.
            mean_logit: Mean of the logits, of all references ``(B,)``.
            squared_norm: Mean squared norm, to which the own sample does not contribute ``(B,)``.
            pivot: The own samples, centred ``(B, d)``, or 0.
            shift: Mean of the references less that ``(B, d)``.
        """
        about = mean_logit / -self._curvature
        is_better = self.is_low & (about < squared_norm)
        away = (pivot - self._points()).add_(shift)  # in this order nothing small is rounded
        return torch.where(is_better, about - torch.linalg.vecdot(away, away), rounded)

    def _without_waiting(self, logits: Tensor, lowest: Tensor, references: Tensor) -> NearLogits:
        """Return as many pairs whatever is near, so that the host need not know how many are."""
        found, columns = logits.topk(min(_CANDIDATES, logits.shape[1]))
        rows = torch.arange(len(logits), device=logits.device)[:, None].expand_as(columns)
        rows, columns = rows.flatten(), columns.flatten()
        values = self._logits(rows, columns, references).view_as(found)
        rounded = found - self.offset[:, None]
        return NearLogits(
            rows, columns, torch.where(found > lowest[:, None], values, rounded).flatten()
        )

    def _logits(self, rows: Tensor, columns: Tensor, references: Tensor) -> Tensor:
        numbers = _ON_ACCELERATOR if devices.host_waits(rows.device) else _DIFFERENCES
        size = max(1, numbers // references.shape[1])
        distances = rows.new_empty(len(rows), dtype=references.dtype)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            differences = self._points(rows[part])
            differences.sub_(references.index_select(0, columns[part]))
            torch.linalg.vector_norm(differences, dim=1, out=distances[part])
        return distances.square_().mul_(self._curvature[rows]).neg_()

    def _points(self, rows: Tensor | None = None) -> Tensor:
        """Return ``x_t/alpha``; it is rounded, but alike for all references."""
        scaled, curvature = self._scaled, self._curvature
        if rows is not None:
            scaled, curvature = (x.index_select(0, rows) for x in (scaled, curvature))
        return scaled / (2 * curvature)[:, None]
