"""The kernel distance between two sets of samples: with Inception features, the KID.

The squared maximum mean discrepancy under the kernel ``(a·b / f + 1)³`` of features of dimension f,
by its unbiased estimate, averaged over random subsets of both sets (Bińkowski et al. 2018, arXiv
1801.01401, section 3). Unlike a Fréchet distance it has no bias that depends on the number of
samples, so it may be negative, and needs no covariance of full rank. torchmetrics computes it.
"""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_vr.core.rng import seed_global_rng
from lightning_vr.core.validation import check_integer
from lightning_vr.metrics.neighbours import wide


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    source: torch.Generator,
    *,
    subsets: int = 100,
    subset_size: int = 100,
) -> float:
    """Return torchmetrics' ``KernelInceptionDistance`` of two sets of features.

    Args:
        real: Features of real samples ``(n, f)``.
        generated: Features of generated samples ``(m, f)``.
        source: Generator of the subsets, on the CPU.
        subsets: Number of subsets.
        subset_size: Samples of either set in each of them. Their mean is the same for every size.

    Raises:
        ValueError: If a set has fewer samples than a subset.
    """
    check_integer("subsets", subsets, 1)
    check_integer("subset_size", subset_size, 2)
    fewest = min(len(real), len(generated))
    if subset_size > fewest:
        raise ValueError(
            f"`subset_size` must be at most {fewest}, the number of samples, got {subset_size}: "
            f"use smaller subsets, or more samples."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        # every rank has all features
        metric = KernelInceptionDistance(
            nn.Identity(), subsets=subsets, subset_size=subset_size, sync_on_compute=False
        )
    metric.update(wide(real), real=True)
    metric.update(wide(generated), real=False)
    with seed_global_rng(source):
        mean, _ = metric.compute()
    return float(mean)
