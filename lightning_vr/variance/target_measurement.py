"""Variance of the regression target against the noise level: DSM, and STF with n references.

For a finite data set, x0 uniform on its N samples and ``x_t = x0 + s noise`` at noise level
s = sigma/alpha, so that one curve serves every schedule,

    V_DSM(s)    = E tr Cov[x0 | x_t] / s⁴
    V_STF(s, n) = E ‖D_S(x_t) - D(x_t)‖² / s⁴

where D is the exact posterior mean of the data set and D_S the STF target for references S. The
unit is that of the unweighted score at alpha = 1, ``(D - x_t) / s²``. In the x_t of a schedule the
same variance is ``alpha² / sigma⁴`` times that of x0, which is 1 / alpha² as much.

V_DSM is the mean of the exact posterior covariance: x_t alone is sampled. As STF is unbiased, V_STF
has two estimates whose only noise is x_t and S: the definition, precise where many references mix,
and V_DSM - E tr Cov[x0 | x_t, S] (law of total variance), precise where few do. Rows mix them by
a rule of x_t alone, which keeps the estimate unbiased. V_STF(1) is V_DSM, and V_STF(N) is 0.

The rows of a batch share references, and in the far field their errors are one and the same;
standard errors therefore come from the means of independent blocks of rows, each with references
of its own. All noise levels share draws, so that curves are smooth: their points are dependent.

The divergence is ``D(s) = E Σ_i ω_i f(1/(N ω_i))`` with the exact posterior weights ω,
f(y) = (1/y - 1)² for y < 3/2 and 8y/27 - 1/3 above. It is D_f(p_0 ‖ p_{0|t}) of theorem 2; section
6.1 of the paper writes the arguments the other way round, which is infinite on a data set.

Source: Xu, Tong and Jaakkola 2023, arXiv 2302.00670, equations 3 and 6, theorem 2, section 6.1.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vr.core.distributed import all_gather_rows, rank, world_size
from lightning_vr.core.progress import progress_bar
from lightning_vr.core.rng import generator
from lightning_vr.core.types import UNLABELLED, Clean, Noised, TargetEstimate
from lightning_vr.estimators.stf import STF
from lightning_vr.posterior.posterior_mean import Posterior, posterior_mean
from lightning_vr.posterior.references import References, check_samples
from lightning_vr.posterior.streamed_softmax import label_mismatch
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
    blocks: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> TargetVarianceCurve:
    """Measure V_DSM, V_STF, ESS and D of a data set, in float64.

    Costs about ``6 N d`` floating-point operations for each sample and noise level; memory beyond
    two copies of the data stays bounded. Under DDP the ranks share the blocks: all of them call it
    with the same data, and get the same curve, which does not depend on their number.

    Args:
        x0: The data set ``(N, *)``.
        noise_levels: ``sigma / alpha``, ``(L,)``, positive.
        references: Numbers of references of STF, the own sample among them, each at most N.
        group: Class labels ``(N,)``: a row of a class uses references of that class alone.
        cond_group: Numbers of further conditions ``(N,)``, which references must share too.
        label_dropout: Fraction of rows whose label is dropped, so that they use all references.
        samples: Number of x_t for each noise level, rounded down to a multiple of ``blocks``.
        blocks: Number of independent sets of references that these share, at least 2.
        seed: Seed of the draws.
        progress: Whether to show a progress bar if it takes longer than a second.

    Raises:
        ValueError: If the data is not finite, a noise level not positive, or a count out of range.
    """
    _check(x0, noise_levels, references, samples, blocks)
    data = _DataSet.prepare(x0, group, cond_group)
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

    Below some level every sample is told from all others and the variance is 0; far above the
    extent of the data all curves are straight lines. Ends beyond these two are drawn in, to
    no less than a decade.

    Args:
        x0: The data set ``(N, *)``.
        low: Lowest noise level of training; may be 0.
        high: Highest noise level of training; may be infinite.
        count: Number of noise levels, at least 2.
        group: Class labels ``(N,)``, or None.
        cond_group: Numbers of further conditions ``(N,)``, or None.
    """
    data = _DataSet.prepare(x0, group, cond_group)
    variance = float(data.bank.squared_norms.mean())
    high = min(high, 10 * math.sqrt(variance) if variance > 0 else 1.0)
    low = min(max(low, 1e-4 * high), 0.1 * high)
    if variance > 0:
        low = min(_lowest_mixing_level(data, low, high, 1e-6 * variance), 0.1 * high)
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    return low * (high / low) ** ramp


@dataclass(frozen=True)
class _DataSet:
    """All samples, flat and in float64, as each other's references."""

    whole: STF
    bank: References
    group: Tensor | None
    cond_group: Tensor | None

    @classmethod
    def prepare(
        cls, x0: Tensor, group: Tensor | None, cond_group: Tensor | None = None
    ) -> "_DataSet":
        device = torch.device("cpu") if x0.device.type == "mps" else x0.device
        whole = STF("all")
        group = None if group is None else group.to(device)
        cond_group = None if cond_group is None else cond_group.to(device)
        flat = x0.flatten(1).to(device).double()
        whole.fill(flat, group, indexed=True, cond_group=cond_group)
        assert isinstance(whole.bank, References)
        return cls(whole, whole.bank, group, cond_group)

    @property
    def size(self) -> int:
        return len(self.bank)

    @property
    def device(self) -> torch.device:
        return self.bank.rows.device

    def target(self, references: int) -> STF:
        """Return STF itself on a shared bank, so that what is measured is what trains."""
        target = copy.copy(self.whole)
        target.references = references
        return target

    def draw(self, count: int, label_dropout: float, *key: int | str) -> Clean:
        """Draw samples, each as often as any other up to one time."""
        source = generator(*key, "rows", device=self.device)
        passes = [
            torch.randperm(self.size, generator=source, device=self.device)
            for _ in range(math.ceil(count / self.size))
        ]
        index = torch.cat(passes)[:count]
        group = None if self.group is None else self.group[index]
        cond_group = None if self.cond_group is None else self.cond_group[index]
        if group is not None and label_dropout > 0:
            u = torch.rand(count, generator=source, device=self.device)
            group = torch.where(u < label_dropout, UNLABELLED, group)
        x0 = self.bank.rows[index] + self.bank.centre
        return Clean(x0, group, index=index, cond_group=cond_group)

    def posterior(self, noised: Noised) -> Posterior:
        """Return the exact posterior, around the own sample for its precision at low noise."""
        return posterior_mean(
            noised.xt,
            noised.alpha,
            noised.sigma,
            self.bank,
            own=noised.x0,
            exclude=noised.index,
            query_group=noised.labels,
        )


def _lowest_mixing_level(data: _DataSet, low: float, high: float, threshold: float) -> float:
    """Bisect for where ``E tr Cov[x0 | x_t]`` is the threshold."""
    clean = data.draw(64, 0.0, "grid")
    for _ in range(12):
        middle = math.sqrt(low * high)
        noised = _noised(clean, clean.x0.new_tensor([middle]), "grid")
        is_mixing = float(data.posterior(noised).spread.mean()) > threshold
        low, high = (low, middle) if is_mixing else (middle, high)
    return low


def _measure_block(
    data: _DataSet, clean: Clean, levels: Tensor, counts: list[int], key: tuple[int, int]
) -> Tensor:
    """Return block means ``(L, 3 + 2 counts)``: spread, D, ESS; error and ESS of each STF."""
    means = []
    for part in torch.split(levels, max(1, _BLOCK_ELEMENTS // clean.x0.numel())):
        noised = _noised(clean, part, *key)
        exact = data.posterior(noised)
        values = [exact.spread, _divergence(noised, data.bank, exact.log_evidence), exact.ess]
        for count in counts:
            source = generator(*key, "references", count, device=data.device)
            target = data.target(count)(noised, clean, source)
            values += [_error(target, exact, count / data.size), target.ess]
        by_level = torch.stack(values, dim=1).reshape(-1, len(part), len(values))
        means.append(by_level.mean(dim=0))
    return torch.cat(means)


def _noised(clean: Clean, levels: Tensor, *key: int | str) -> Noised:
    """Noise each sample at every level, with one noise: L draws of a sample next to each other."""
    source = generator(*key, "noise", device=levels.device)
    shape, dtype = clean.x0.shape, clean.x0.dtype
    noise = torch.randn(shape, generator=source, device=levels.device, dtype=dtype)

    row = torch.arange(len(noise), device=levels.device).repeat_interleave(len(levels))
    sigma = levels.repeat(len(noise))
    clean, noise = clean.rows(row), noise[row]
    ones = torch.ones_like(sigma)
    xt = clean.x0 + sigma[:, None] * noise
    return Noised(
        xt,
        clean.x0,
        noise,
        sigma,
        ones,
        sigma,
        ones,
        clean.group,
        index=clean.index,
        cond_group=clean.cond_group,
    )


def _error(target: TargetEstimate, exact: Posterior, fraction: float) -> Tensor:
    """Return ``E ‖D_S - D‖²`` for each row, its two estimates mixed by a rule of x_t alone."""
    by_definition = (target.x0 - exact.mean).square().sum(dim=1)
    by_difference = exact.spread - target.spread
    share = 1 / (1 + fraction * (exact.ess - 1))
    return torch.lerp(by_definition, by_difference, share)


def _divergence(noised: Noised, bank: References, log_evidence: Tensor) -> Tensor:
    """Return ``Σ ω f(1/(N ω))`` for each row, from ``N ω = p(x_t | x_i) / p(x_t)``."""
    query = noised.xt - bank.centre
    precision = noised.sigma**-2
    offset = 0.5 * query.shape[1] * torch.log(precision / (2 * math.pi)) - log_evidence
    offset -= 0.5 * precision * torch.linalg.vecdot(query, query)

    total, count, labels = torch.zeros_like(offset), torch.zeros_like(offset), noised.labels
    for start, rows, norms in bank.chunks(None, len(query), query.dtype):
        logits = precision[:, None] * (query @ rows.T - 0.5 * norms)
        ratio = torch.exp(logits + offset[:, None])
        terms = torch.where(ratio > 2 / 3, ratio * (ratio - 1) ** 2, 8 / 27 - ratio / 3)
        if labels is not None and bank.group is not None:
            is_foreign = label_mismatch(labels, bank.group[start : start + len(rows)])
            terms.masked_fill_(is_foreign, 0)
            count -= is_foreign.sum(dim=1)
        total += terms.sum(dim=1)
        count += len(rows)
    return total / count


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
    check_samples("x0", x0)
    if not bool(torch.isfinite(x0).all()):
        raise ValueError("Argument `x0` expected to be finite: remove NaN and infinity from it.")
    if noise_levels.ndim != 1 or not bool(((noise_levels > 0) & noise_levels.isfinite()).all()):
        raise ValueError(
            f"Argument `noise_levels` expected to be positive, finite and of shape (L,), but got "
            f"{noise_levels.tolist()}."
        )
    for count in references:
        if not 1 <= count <= len(x0):
            raise ValueError(
                f"Argument `references` expected to hold numbers between 1 and {len(x0)}, the "
                f"number of samples measured on, but got {count}: use fewer references."
            )
    if not 2 <= blocks <= samples:
        raise ValueError(
            f"Arguments `samples` and `blocks` expected to satisfy 2 <= blocks <= samples, "
            f"but got {samples} samples in {blocks} blocks."
        )
