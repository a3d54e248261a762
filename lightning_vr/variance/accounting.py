"""What variance costs, and what an estimator with less variance saves.

The variance of a gradient estimate is ``Var = E‖g - μ‖² = tr Cov(g)``. With R samples of data, each
noised K times, and T seconds for both,

    Var(R, K) = (V_B + V_W / K) / R            between samples, and within one of them
    T(R, K)   = fixed + upstream R + denoise R K

Apart from ``fixed``, their product ``H(K) = (V_B + V_W/K) (upstream + K denoise)`` does not depend
on R. It is least at ``K*² = V_W upstream / (V_B denoise)``, among integers at the smallest K
with K (K + 1) >= K*². A K that is wrong by the factor γ costs no more than (2 + γ + 1/γ) / 4 times
the least: 12.5 % for γ = 2. This rule and the split are ours; the paper sweeps K.

Two estimators are compared by

    ECM = V_b T_b / (V_m T_m)      seconds of the baseline over those of the method at equal
                                   variance, as the variance of a mean falls as 1 / seconds
    RE  = V_b / V_m                the same at equal R and K, whatever the time

Less variance is fewer steps only where noise holds the training back. A batch of B has the noise
ratio ``ν = V / (B ‖μ‖²)``, and ``S = S_min (1 + ν)`` steps reach a given loss: ν = B_noise / B
with B_noise = tr Cov(g) / ‖μ‖² of one sample. This is a model: gradient descent with a tuned
learning rate on a loss of equal curvature in all directions. It predicts

    speedup = (B ‖μ‖² + V_b) T_b / ((B ‖μ‖² + V_m) T_m),

the ECM where ν is large, the ratio of times where it is small.

Sources: Bettencourt, Wu, Atzmon, Lucas and Lorraine 2026, arXiv 2605.21489 (Var, ECM, RE and reuse
of a sample); McCandlish, Kaplan, Amodei and the OpenAI Dota Team 2018, arXiv 1812.06162.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vr.core.validation import check_at_least, check_positive
from lightning_vr.variance.intervals import Interval, jackknife, ratio

_EXCESS_KURTOSIS = 1.0
"""Of what a repetition adds to the log of a ratio of variances. With it 95 % intervals of 3 to 10
repetitions hold in 93 to 98 % on toys whose gradients have rare large values; with 0, in 90 to 95.
"""


@dataclass(frozen=True)
class CostModel:
    """Seconds of one step: ``T(R, K) = fixed + upstream R + denoise R K``.

    Attributes:
        fixed: Seconds for each step, whatever its size.
        upstream: Seconds for each sample: loading, augmenting, encoding.
        denoise: Seconds for each noised sample: forward and backward through the network.
    """

    fixed: float
    upstream: float
    denoise: float

    def seconds(self, samples: int, resamples: int) -> float:
        """Return T(R, K)."""
        return self.fixed + samples * (self.upstream + resamples * self.denoise)


def fixed_and_marginal(
    few: int, many: int, seconds_few: float, seconds_many: float
) -> tuple[float, float]:
    """Return the seconds of a pass whatever its size, and of each further row, from two passes.

    They are those of the line through both. A larger pass that was not measured to take longer
    gives no slope: its seconds per row, which bound the cost of a row from above, then count as
    marginal. So no row costs nothing, which would make any number of resamples pay.

    Args:
        few: Rows of the smaller pass.
        many: Rows of the larger pass; both may be the same.
        seconds_few: Seconds of the smaller pass.
        seconds_many: Seconds of the larger pass.

    Raises:
        ValueError: If ``few`` is below 1, or ``many`` below ``few``.
    """
    check_at_least("few", few, 1)
    check_at_least("many", many, few)
    if many == few or seconds_many <= seconds_few:
        return 0.0, seconds_many / many
    marginal = (seconds_many - seconds_few) / (many - few)
    return max(0.0, seconds_few - few * marginal), marginal


def best_resamples(between: float, within: float, cost: CostModel, *, largest: int = 64) -> int:
    """Return the K in 1, ..., ``largest`` of least variance times cost, the smallest such K.

    Estimates may be 0 or less and then count as 0: K is 1 if V_W or the upstream cost is 0, else
    ``largest`` if V_B or the cost of denoising is 0. The fixed cost is left out, as it is shared by
    any number of samples; if R cannot grow, add ``fixed / R`` to ``upstream``.

    Args:
        between: V_B, variance between samples.
        within: V_W, variance within a sample for one draw of time and noise; unit of ``between``.
        cost: Seconds of a sample and of a resample.
        largest: Largest K allowed, at least 1.

    Raises:
        ValueError: If a number is not finite, or ``largest`` below 1.
    """
    check_at_least("largest", largest, 1)
    numbers = (between, within, cost.upstream, cost.denoise)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(
            f"`between`, `within` and `cost` must be finite, got {between}, {within} and {cost}: "
            f"leave out the measurements that are not."
        )

    if within <= 0 or cost.upstream <= 0:
        return 1
    if between <= 0 or cost.denoise <= 0:
        return largest
    squared_optimum = (within / between) * (cost.upstream / cost.denoise)
    return next((k for k in range(1, largest) if k * (k + 1) >= squared_optimum), largest)


def variance_times_cost(between: float, within: float, cost: CostModel, resamples: float) -> float:
    """Return ``H(K) = (V_B + V_W / K) (upstream + K denoise)``, the fixed cost left out.

    Raises:
        ValueError: If ``resamples``, which is K, is not positive.
    """
    check_positive("resamples", resamples)
    return (between + within / resamples) * (cost.upstream + resamples * cost.denoise)


def relative_efficiency(baseline: Tensor, variance: Tensor) -> Interval:
    """Return RE, variance of the baseline over that of the method, with its 95 % interval.

    Args:
        baseline: Unbiased estimates of the baseline's variance, one of each repetition ``(n,)``.
        variance: The same of the method, at the same R and K, on the same draws.
    """
    return _log_efficiency(baseline, variance).exp()


def effective_compute_multiplier(
    baseline: Tensor, variance: Tensor, baseline_seconds: Tensor, seconds: Tensor
) -> Interval:
    """Return ECM, seconds of the baseline over those of the method at equal variance, with 95 %.

    Args:
        baseline: As ``relative_efficiency`` takes it.
        variance: The same of the method.
        baseline_seconds: Seconds of steps of the baseline, in turn with the method's ``(m,)``.
        seconds: Seconds of steps of the method ``(m,)``.
    """
    # single times may be far off: the mean of logs
    faster = jackknife(lambda mean: mean, (baseline_seconds / seconds).log())
    return _log_efficiency(baseline, variance).plus(faster).exp()


def training_speedup(
    baseline: Tensor,
    variance: Tensor,
    signal: Tensor,
    baseline_seconds: Tensor,
    seconds: Tensor,
    level: float = 0.95,
) -> Interval:
    """Return how many times less compute the method needs for the same loss, by the noise ratio.

    Args:
        baseline: As ``relative_efficiency`` takes it.
        variance: The same of the method.
        signal: Unbiased estimates of ``B ‖μ‖²`` in the same repetitions ``(n,)``. A mean of 0 or
            less is not resolved from 0.
        baseline_seconds: Seconds of steps of the baseline in the same repetitions ``(n,)``.
        seconds: The same of the method.
        level: Probability that the interval covers the true number.

    Rare large variances reach the saving as far as variance decides it: for ``V / (B ‖μ‖² + V)`` of
    their share. With all of it, intervals of a job whose noise is a fifth of its signal would hold
    in 97 %.
    """

    def log_saving(base: Tensor, own: Tensor, mean: Tensor, faster: Tensor) -> Tensor:
        return steps_ratio(base, own, mean).log() + faster

    faster = (baseline_seconds / seconds).log()
    samples = (baseline, variance, signal, faster)
    noise, clear = (max(0.0, float(x.mean())) for x in (baseline, signal))
    kurtosis = _EXCESS_KURTOSIS * (noise / (noise + clear) if noise > 0 else 0.0)
    return jackknife(log_saving, *samples, level=level, excess_kurtosis=kurtosis).exp()


def noise_ratio(variance: float, squared_mean: float, batch: int) -> float:
    """Return ``ν = V / (B ‖μ‖²)``, the variance of a batch's mean over its squared signal.

    Args:
        variance: V, variance of one sample's gradient: V_B + V_W / K.
        squared_mean: Estimate of ‖μ‖². Unbiased ones may be 0 or less: then no signal is resolved,
            and ν is infinite (NaN if there is no variance either).
        batch: B, number of independent samples of an optimizer step, over ranks and accumulation.

    Raises:
        ValueError: If ``variance`` is negative, or ``batch`` below 1.
    """
    _check_not_negative("variance", variance)
    check_at_least("batch", batch, 1)
    return _divide(variance, batch * squared_mean)


def steps_ratio(baseline: Tensor, variance: Tensor, signal: Tensor) -> Tensor:
    """Return how many times fewer optimizer steps reach the same loss: ``(s + V_b) / (s + V_m)``.

    From S = S_min (1 + ν). Where noise is the bottleneck, steps fall as variance does. Where it is
    not, steps are at S_min already and stay there however little variance is left. The ratio is
    never above 1 + ν.

    Args:
        baseline: V_b, variance of one sample's gradient.
        variance: V_m, the same of the method.
        signal: s, ``B ‖μ‖²``; negative estimates count as 0.
    """
    signal = signal.clamp(min=0)
    return ratio(signal + baseline, signal + variance)


def _log_efficiency(baseline: Tensor, variance: Tensor) -> Interval:
    return jackknife(
        lambda base, own: ratio(base, own).log(),
        baseline,
        variance,
        excess_kurtosis=_EXCESS_KURTOSIS,
    )


@dataclass(frozen=True)
class BatchScaling:
    """What changes with the batch size, as ratios of the new to the old.

    Attributes:
        batch: The new batch size.
        steps: Optimizer steps to the same loss.
        samples: Samples to the same loss.
        sgd: Learning rate of stochastic gradient descent.
        adam: Learning rate of Adam.
    """

    batch: float
    steps: float
    samples: float
    sgd: float
    adam: float


def batch_scaling(noise_scale: float, batch: float, other: float) -> BatchScaling:
    """Return what another batch size changes.

    Steps are ``S_min (1 + B_noise / B)``, and the best learning rate of stochastic gradient descent
    is their inverse but for a constant, ``lr ∝ B / (B + B_noise)`` (McCandlish et al. 2018, arXiv
    1812.06162, section 2.2). That of Adam follows the square root rule, ``lr ∝ √B``
    (Malladi et al. 2022, arXiv 2205.10287), which holds where noise dominates: below the noise
    scale. Beyond it neither grows much.

    Args:
        noise_scale: B_noise.
        batch: B, the present batch size.
        other: The new one.

    Raises:
        ValueError: If a batch size is not positive, or ``noise_scale`` is negative.
    """
    check_positive("batch", batch)
    check_positive("other", other)
    _check_not_negative("noise_scale", noise_scale)
    signal = 1 / (1 + noise_scale / batch)
    faster = 1 / (signal + (1 - signal) * batch / other)
    return BatchScaling(other, 1 / faster, other / batch / faster, faster, math.sqrt(other / batch))


def _divide(numerator: float, denominator: float) -> float:
    pair = torch.tensor([numerator, denominator], dtype=torch.float64)
    return float(ratio(pair[0], pair[1]))


def _check_not_negative(name: str, value: float) -> None:
    """Raise if a number is negative; one that was not measured, NaN, stays NaN."""
    if not math.isnan(value):
        check_at_least(name, value, 0)
