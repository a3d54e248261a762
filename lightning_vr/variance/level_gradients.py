"""The signal of a gradient: products of mean gradients at different noise levels, unbiased.

With ``m_l = E[g | noise level in bin l]``, the mean gradients of two bins pull together or against
each other (negative transfer: Go et al. 2023, arXiv 2306.00354) by the cosine

    cos_lk = ⟨m_l, m_k⟩ / (‖m_l‖ ‖m_k‖).

Estimates of both from one batch share its noise, which makes ``‖m̂‖²`` too large by the variance. So
a batch is split into halves A and B with independent data, times and noise, and the products are

    ⟨m_l, m_k⟩ ≈ ½ (⟨a_l, b_k⟩ + ⟨a_k, b_l⟩),    tr Cov(g | bin l) ≈ n/2 ‖a_l - b_l‖²

with n samples in a half: both unbiased. Ratios of their means over many batches give cosines and
noise scales (``variance.signal_statistics``). Bins are equally likely and all take the same halves,
so a measurement costs two more gradients of half a batch for each bin. Row 0 has all times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vr.core.distributed import all_reduce_mean, world_size
from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.core.types import Clean
from lightning_vr.variance.gradient_measurement import GradientMeasurement, Source
from lightning_vr.variance.gradient_sketch import sketched

_SKETCH = 1 << 16
"""Numbers kept of each gradient: products are off by less than 1 % of the product of norms."""


def level_products(
    measurement: GradientMeasurement,
    halves: Sequence[Clean],
    count: int,
    shared: Source,
    size: int = _SKETCH,
) -> tuple[Tensor, Tensor]:
    """Measure the products of mean gradients at noise levels; all ranks must call it.

    Ranks average their gradients, so that two ranks with half of the samples each give what one
    gives with all.

    Args:
        measurement: Takes the gradients.
        halves: Two batches of n samples each, equally many on all ranks, none in both.
        count: L, the number of equally likely bins.
        shared: Gives generators that are the same on all ranks.
        size: Numbers that are kept of each gradient.

    Returns:
        Products ``(1 + L, 1 + L)``, and the variance of one sample's gradient ``(1 + L,)``: of all
        times first, then of each bin. Float64, on the CPU.
    """
    bins = [(0.0, 1.0), *((i / count, (i + 1) / count) for i in range(count))]
    taken = []
    with preserve_global_rng():
        for i, half in enumerate(halves):
            for j, (low, high) in enumerate(bins):
                gradient = measurement.gradient_between(half, "half", i, j, low=low, high=high)
                taken.append(sketched(gradient, size, shared("sketch")))
    first, second = all_reduce_mean(torch.stack(taken)).cpu().double().chunk(2)
    products = first @ second.mT
    samples = len(halves[0].x0) * world_size()
    variances = 0.5 * samples * (first - second).square().sum(dim=1)
    return 0.5 * (products + products.mT), variances
