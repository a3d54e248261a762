"""Confidence intervals: of functions of means by the bootstrap, of a median by order statistics.

The bootstrap resamples independent repetitions (Efron 1979). Its percentile interval of a ratio of
means covers a few percent less than stated below some fifty repetitions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.rng import generator
from lightning_vr.core.validation import check_at_least


class Interval(NamedTuple):
    """A number and its confidence interval.

    Attributes:
        estimate: The number as measured.
        low: Lower end of the interval, may be minus infinity.
        high: Upper end of the interval, may be infinity.
    """

    estimate: float
    low: float
    high: float


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the ratio of estimates of two numbers that cannot be negative, for ``bootstrap``.

    A denominator of 0 or less cannot be told from 0. The ratio is then infinite, not negative, so
    that it lies at the upper end of an interval; it is NaN if the numerator is 0 or less as well.
    """
    unresolved = torch.where(numerator > 0, math.inf, math.nan)
    return torch.where(denominator <= 0, unresolved, numerator / denominator)


@torch.no_grad()
def bootstrap(
    statistic: Callable[..., Tensor],
    *samples: Tensor,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a function of means and its percentile interval, over n independent repetitions.

    Each resample draws n of the repetitions with replacement, the same ones for all ``samples``:
    what the samples of a repetition share cancels, and independent samples lose nothing.

    A resample whose statistic is NaN may have any value: it counts as below the lower end and as
    above the upper end. More of them than ``(1 - level) / 2`` make the interval all numbers.

    Args:
        statistic: Maps means, each ``(m, ...)``, to numbers ``(m,)`` row by row, as ``ratio`` does.
        *samples: Numbers of each repetition ``(n, ...)``, n at least 2 and common to all.
        resamples: Number of resamples, at least 1.
        level: Probability that the interval covers the true number, between 0 and 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If the samples do not have a common n, ``statistic`` does not return a number
            for each row, or a setting is out of range.
    """
    n = _check_repetitions(samples)
    check_at_least("resamples", resamples, 1)
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level}: use 0.95 for 95 %.")

    # the first row has every repetition once: it gives the estimate
    index = torch.randint(n, (resamples, n), generator=generator(seed, "bootstrap"))
    counts = torch.ones(resamples + 1, n, dtype=torch.float64)
    counts[1:] = torch.zeros_like(counts[1:]).scatter_add_(1, index, counts[1:])
    means = (torch.tensordot(counts, sample.cpu().double(), 1) / n for sample in samples)

    values = statistic(*means)
    if values.shape != (resamples + 1,):
        raise ValueError(
            f"`statistic` must return one number for each row of the means, of shape "
            f"{(resamples + 1,)}, got {tuple(values.shape)}: reduce all other dimensions."
        )

    # neither end is interpolated, which infinity would turn into NaN
    estimate, drawn, tail = float(values[0]), values[1:], (1 - level) / 2
    low = torch.where(drawn.isnan(), -math.inf, drawn).quantile(tail, interpolation="lower")
    high = torch.where(drawn.isnan(), math.inf, drawn).quantile(1 - tail, interpolation="higher")
    return Interval(estimate, float(low), float(high))


def median_interval(values: Tensor, *, level: float = 0.95) -> Interval:
    """Return the median of independent ``values (n,)`` and its interval, whatever their law.

    It lies between the k-th smallest and the k-th largest with probability 1 - 2 P(X < k) for X
    binomial with n and 1/2. Fewer than six values cannot give 95 %: the interval is their range.
    """
    ordered, n = values.double().sort().values, len(values)
    k, outside = 1, 2 * 0.5**n
    while k < (n + 1) // 2 and outside + 2 * math.comb(n, k) * 0.5**n <= 1 - level:
        outside += 2 * math.comb(n, k) * 0.5**n
        k += 1
    middle = float(ordered[[(n - 1) // 2, n // 2]].mean())
    return Interval(middle, float(ordered[k - 1]), float(ordered[n - k]))


def _check_repetitions(samples: Sequence[Tensor]) -> int:
    shapes = [tuple(sample.shape) for sample in samples]
    repetitions = {shape[0] if shape else 0 for shape in shapes}
    if len(repetitions) != 1 or min(repetitions) < 2:
        raise ValueError(
            f"`samples` must be tensors (n, ...) with one n of at least 2, got shapes {shapes}: "
            f"give the numbers of the same repetitions in all of them."
        )
    return repetitions.pop()
