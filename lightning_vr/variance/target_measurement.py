"""Variance of the regression target against the noise level: DSM, and STF with n references.

For a finite data set, x0 uniform on its N samples and ``x_t = x0 + s noise`` at noise level
s = sigma/alpha, so that one curve serves every schedule,

    V_DSM(s)    = E tr Cov[x0 | x_t] / s⁴
    V_STF(s, n) = E ‖D_S(x_t) - D(x_t)‖² / s⁴

where D is the exact posterior mean of the data set and D_S the STF target for references S. The
unit is that of the unweighted score at alpha = 1, ``(D - x_t) / s²``. In the x_t of a schedule the
same variance is ``alpha² / sigma⁴`` times that of x0, which is 1 / alpha² as much.

V_DSM is the mean of the exact posterior covariance: only x_t is sampled. As STF is unbiased, V_STF
has two estimates whose only noise is x_t and S: the definition, precise where many references mix,
and V_DSM - E tr Cov[x0 | x_t, S] (law of total variance), precise where few do. The weights of the
two depend on x_t alone, which keeps the estimate unbiased. V_STF(1) is V_DSM, and V_STF(N) is 0.

The rows of a batch share references, and in the far field all their errors are the same. Standard
errors therefore come from the means of independent blocks of rows, each with its own references.
All noise levels share draws, so that curves are smooth: their points are dependent.

The divergence is ``D(s) = E Σ_i ω_i f(1/(N ω_i))`` with the exact posterior weights ω,
f(y) = (1/y - 1)² for y < 3/2 and 8y/27 - 1/3 above. It is D_f(p_0 ‖ p_{0|t}) of theorem 2; section
6.1 of the paper writes the arguments the other way round, which is infinite on a data set.

Source: Xu, Tong and Jaakkola 2023, arXiv 2302.00670, equations 3 and 6, theorem 2, section 6.1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vr.core.distributed import all_gather_rows, rank, world_size
from lightning_vr.core.progress import progress_bar
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean, TargetEstimate
from lightning_vr.core.validation import check_finite, check_samples
from lightning_vr.posterior.posterior_mean import Posterior
from lightning_vr.variance.empirical_distribution import EmpiricalDistribution, noise_at_levels
from lightning_vr.variance.target_curves import MeasuredCurve, TargetVarianceCurve

_BLOCK_ELEMENTS = 1 << 20
"""Noised values at a time, so that memory does not grow with the number of noise levels."""


@torch.no_grad()
def measure_target_variance(
    x0: Tensor,
    noise_levels: Tensor,
    references: Sequence[int],
    *,
    group: Tensor | None = None,
    cond_group: Tensor | None = None,
    label_dropout: float = 0.0,
    samples: int = 1024,
    blocks: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TargetVarianceCurve:
    """Measure V_DSM, V_STF, ESS and D of a data set, in float64.

    It costs about ``6 N d`` floating-point operations for each sample and noise level; memory
    beyond two copies of the data stays bounded. Under DDP each rank measures some of the blocks:
    all call it with the same data and get the same curve, which does not depend on their number.

    Args:
        x0: The data set ``(N, *)``.
        noise_levels: ``sigma / alpha``, ``(L,)``, positive.
        references: Numbers of references of STF, the sample itself included, each at most N.
        group: Class labels ``(N,)``: a row of a class uses references of that class alone.
        cond_group: Numbers of further conditions ``(N,)``, which references must share too.
        label_dropout: Fraction of rows whose label is dropped, so that they use all references.
        samples: Number of x_t for each noise level, rounded down to a multiple of ``blocks``.
        blocks: Number of independent sets of references that these share, at least 2. If not given,
            one for every 4 samples and at most 64: the standard errors rest on their scatter.
        seed: Seed of the draws.
        progress: Whether to show a progress bar if it takes longer than a second.

    Raises:
        ValueError: If the data is not finite, a noise level not positive, or a count out of range.
    """
    blocks = max(2, min(64, samples // 4)) if blocks is None else blocks
    _check(x0, noise_levels, references, samples, blocks)
    data = EmpiricalDistribution.prepare(x0, group, cond_group)
    levels = noise_levels.to(data.device, torch.float64)
    counts = sorted({*references} - {1, data.size})

    mine = range(rank(), blocks, world_size())
    found = levels.new_empty(len(mine), len(levels), 3 + 2 * len(counts))
    for i, block in enumerate(progress_bar(mine, "Target variance", is_shown=progress)):
        clean = data.draw(samples // blocks, label_dropout, seed, block)
        found[i] = _measure_block(data, clean, levels, counts, (seed, block))

    order = all_gather_rows(torch.tensor(mine, dtype=torch.int64, device=data.device)).argsort()
    means = all_gather_rows(found)[order].cpu()
    return _curve(means, levels.cpu(), data.size, sorted({*references}), counts)


@torch.no_grad()
def noise_level_grid(
    x0: Tensor,
    low: float,
    high: float,
    count: int,
    *,
    group: Tensor | None = None,
    cond_group: Tensor | None = None,
) -> Tensor:
    """Return noise levels, evenly spaced in the logarithm, over which the target variance changes.

    Below some level every sample can be told from all others and the variance is 0; far above the
    extent of the data all curves are straight lines. The grid ends at these two levels where
    ``low`` and ``high`` lie beyond, but spans at least a decade.

    Args:
        x0: The data set ``(N, *)``.
        low: Lowest noise level of training; may be 0.
        high: Highest noise level of training; may be infinite.
        count: Number of noise levels, at least 2.
        group: Class labels ``(N,)``, or None.
        cond_group: Numbers of further conditions ``(N,)``, or None.
    """
    data = EmpiricalDistribution.prepare(x0, group, cond_group)
    variance = float(data.bank.squared_norms.mean())
    high = min(high, 10 * math.sqrt(variance) if variance > 0 else 1.0)
    low = min(max(low, 1e-4 * high), 0.1 * high)
    if variance > 0:
        low = min(_lowest_mixing_level(data, low, high, 1e-6 * variance), 0.1 * high)
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    return low * (high / low) ** ramp


def _lowest_mixing_level(
    data: EmpiricalDistribution, low: float, high: float, threshold: float
) -> float:
    """Bisect for where ``E tr Cov[x0 | x_t]`` is the threshold."""
    clean = data.draw(64, 0.0, "grid")
    for _ in range(12):
        middle = math.sqrt(low * high)
        noised = noise_at_levels(clean, clean.x0.new_tensor([middle]), "grid")
        is_mixing = float(data.posterior(noised).spread.mean()) > threshold
        low, high = (low, middle) if is_mixing else (middle, high)
    return low


def _measure_block(
    data: EmpiricalDistribution,
    clean: Clean,
    levels: Tensor,
    counts: list[int],
    key: tuple[int, int],
) -> Tensor:
    """Return block means ``(L, 3 + 2 counts)``: spread, D, ESS; error and ESS of each STF."""
    means = []
    for part in torch.split(levels, max(1, _BLOCK_ELEMENTS // clean.x0.numel())):
        noised = noise_at_levels(clean, part, *key)
        exact = data.posterior(noised)
        values = [exact.spread, data.divergence(noised, exact.log_evidence), exact.ess]
        for count in counts:
            source = generator(*key, "references", count, device=data.device)
            target = data.target(count)(noised, clean, source)
            values += [_error(target, exact, count / data.size), target.ess]
        by_level = torch.stack(values, dim=1).reshape(-1, len(part), len(values))
        means.append(by_level.mean(dim=0))
    return torch.cat(means)


def _error(target: TargetEstimate, exact: Posterior, fraction: float) -> Tensor:
    """Return ``E ‖D_S - D‖²`` for each row, a mean of two estimates weighted by x_t alone."""
    by_definition = (target.x0 - exact.mean).square().sum(dim=1)
    by_difference = exact.spread - target.spread
    weight = 1 / (1 + fraction * (exact.ess - 1))
    return torch.lerp(by_definition, by_difference, weight)


def _curve(
    means: Tensor, levels: Tensor, size: int, references: list[int], counts: list[int]
) -> TargetVarianceCurve:
    """Turn block means ``(blocks, L, 3 + 2 counts)`` into curves with standard errors."""
    spread, divergence, effective, *others = means.unbind(dim=2)
    zero, one = torch.zeros_like(levels), torch.ones_like(levels)
    unit = levels**-4

    dsm = _measured(spread * unit)
    stf = {1: dsm, size: MeasuredCurve(zero, zero)}
    ess = {1: MeasuredCurve(one, zero), size: _measured(effective)}
    for i, count in enumerate(counts):
        stf[count] = _measured(others[2 * i] * unit)
        ess[count] = _measured(others[2 * i + 1])
    return TargetVarianceCurve(
        levels,
        size,
        dsm,
        {n: stf[n] for n in references},
        {n: ess[n] for n in sorted({*references, size})},
        _measured(divergence),
    )


def _measured(blocks: Tensor) -> MeasuredCurve:
    return MeasuredCurve(blocks.mean(dim=0), blocks.std(dim=0) / math.sqrt(len(blocks)))


def _check(
    x0: Tensor, noise_levels: Tensor, references: Sequence[int], samples: int, blocks: int
) -> None:
    """Raise if the data or a setting cannot be measured with."""
    check_samples("x0", x0)
    check_finite("x0", x0)
    if noise_levels.ndim != 1 or not bool(((noise_levels > 0) & noise_levels.isfinite()).all()):
        raise ValueError(
            f"`noise_levels` must be positive, finite and of shape (L,), got "
            f"{noise_levels.tolist()}: leave out the others."
        )
    for count in references:
        if not 1 <= count <= len(x0):
            raise ValueError(
                f"`references` must be numbers between 1 and {len(x0)}, the number of samples "
                f"measured on, got {count}: use fewer references."
            )
    if not 2 <= blocks <= samples:
        raise ValueError(
            f"`samples` and `blocks` must satisfy 2 <= blocks <= samples, got {samples} samples in "
            f"{blocks} blocks: use more samples or fewer blocks."
        )
