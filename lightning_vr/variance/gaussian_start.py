"""Where a sampler begins, coupled with exact samples at the largest noise level.

A sampler begins with N(0, s² I), the data noised at level s have mean m and covariance C + s² I.
Between normal laws the optimal map is linear (Gelbrich 1990):

    y = s (C + s² I)^(-1/2) (x - m),      E ‖y - x‖² = ‖m‖² + Σ (sqrt(λ_i + s²) - s)²

with λ the eigenvalues of C. That is the squared Wasserstein-2 distance for normal data, and never
more than it for others, whose noised law differs from a normal one by third and higher moments: of
relative order (extent of the data / s)³, small where s is several times the extent.
"""

import torch
from torch import Tensor

from lightning_vr.core.types import UNLABELLED

_LARGEST_SET = 2048
"""Samples whose mean and covariance stand for those of larger sets."""


def gaussian_start(
    x: Tensor,
    level: float,
    data: Tensor,
    group: Tensor | None = None,
    data_group: Tensor | None = None,
) -> Tensor:
    """Return standard normal noise times ``level``, coupled with samples of the noised data.

    Args:
        x: Exact samples at the level, in z ``(n, d)``.
        level: The noise level.
        data: The data set ``(N, d)``.
        group: Class of each of ``x`` ``(n,)``, whose own moments count; negative for all data.
        data_group: Class of each of ``data`` ``(N,)``.
    """
    if group is None or data_group is None:
        return _transport(x, level, data)
    y = torch.empty_like(x)
    for label in {*group.tolist()}:
        rows = group == label
        own = data if label <= UNLABELLED else data[data_group == label]
        y[rows] = _transport(x[rows], level, own)
    return y


def _transport(x: Tensor, level: float, data: Tensor) -> Tensor:
    count = min(len(data), _LARGEST_SET)
    part = data[torch.arange(count, device=data.device) * len(data) // count]
    mean = part.mean(dim=0)
    _, scale, axes = torch.linalg.svd((part - mean) / count**0.5, full_matrices=False)
    z = x - mean
    factor = level / torch.sqrt(scale**2 + level**2) - 1
    moved: Tensor = z + ((z @ axes.T) * factor) @ axes
    return moved
