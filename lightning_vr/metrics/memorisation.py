"""Whether generated samples are closer to training samples than new data is.

The distance from a sample to its nearest training sample, in a space of features, is small for a
copy. What is small, held-out data says, which the model cannot have copied: the threshold is a low
quantile of its distances, that of rank j among m held-out samples. If the model is no closer to its
training set than new data is, the n generated and the m held-out distances are exchangeable, and
whatever their distribution, the number of generated samples below the threshold is beta-binomial
with parameters n, j and m + 1 - j. Its mean is ``n j / (m + 1)``, and its upper tail gives the
probability of a count at least as large without memorisation (one-sided, exact, and conservative
where distances are tied).

The comparison with held-out data is that of Meehan et al. 2020 (arXiv 2004.05675), there as a test
of ranks over all distances; the low quantile finds a model that copies a few samples, as large ones
do (Carlini et al. 2023, arXiv 2301.13188). Alaa et al. 2022 (arXiv 2102.08921, section 2.2) compare
with distances within the training set instead. A copy that the features tell apart from its
original, such as a crop, is not found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vr.metrics.neighbours import nearest_distances


@dataclass(frozen=True)
class Memorisation:
    """What distances to the training set say.

    Attributes:
        fractions: Fraction of each set of generated samples that is below the threshold.
        expected: Fraction without memorisation.
        threshold: The distance below which a sample is close.
        p_value: Probability of so many close samples, over all sets, without memorisation.
    """

    fractions: list[float]
    expected: float
    threshold: float
    p_value: float


def memorisation(
    train: Tensor, held_out: Tensor, generated: Sequence[Tensor], quantile: float = 0.05
) -> Memorisation:
    """Compare samples' distances to a training set with those of held-out data.

    Args:
        train: Features of training samples ``(N, f)``.
        held_out: Features of data that was not trained on ``(m, f)``.
        generated: Features of sets of generated samples, each ``(n, f)``.
        quantile: Fraction of held-out samples that count as close.

    Raises:
        ValueError: If there are too few held-out samples for the quantile.
    """
    check_held_out(len(held_out), quantile)
    order = int(quantile * len(held_out) + 1e-9)
    threshold = nearest_distances(held_out, train).kthvalue(order).values
    close = [int((nearest_distances(each, train) < threshold).sum()) for each in generated]
    total = sum(len(each) for each in generated)
    return Memorisation(
        fractions=[count / len(each) for count, each in zip(close, generated, strict=True)],
        expected=order / (len(held_out) + 1),
        threshold=float(threshold),
        p_value=beta_binomial_tail(sum(close), total, order, len(held_out) + 1 - order),
    )


def beta_binomial_tail(least: int, count: int, a: float, b: float) -> float:
    """Return the probability that a beta-binomial variable is ``least`` or more.

    Args:
        least: Its smallest value in the tail.
        count: Number of trials.
        a: First parameter of the beta distribution of their probability.
        b: Second parameter.
    """
    k = torch.arange(least, count + 1, dtype=torch.float64)
    log_choices = -math.log(count + 1) - _log_beta(k + 1, count - k + 1)
    log_ratio = _log_beta(k + a, count - k + b) - _log_beta(k.new_tensor(a), k.new_tensor(b))
    return min(1.0, float((log_choices + log_ratio).exp().sum()))


def check_held_out(count: int, quantile: float) -> None:
    """Raise if no held-out sample is within the quantile.

    Raises:
        ValueError: With the numbers.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"`quantile` must be between 0 and 1, got {quantile}: use 0.05.")
    least = math.ceil(1 / quantile - 1e-9)
    if count < least:
        raise ValueError(
            f"There must be at least {least} held-out samples for the quantile {quantile:g} of "
            f"their distances to the training set, got {count}: use more, or leave out the measure "
            f"'memorisation'."
        )


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
