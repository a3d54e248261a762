"""The posterior mean of x0 given x_t under a set of references: a streamed softmax.

Under ``x_t = alpha x0 + sigma noise`` and x0 uniform on references ``r_1 .. r_n``,

    E[x0 | x_t] = Σ_k w_k r_k,   w = softmax(ℓ),
    ℓ_k = (alpha/sigma²) x_t·r_k - (alpha²/2sigma²) ‖r_k‖²

(‖x_t‖² is common to all k and drops out). It is the target of Stable Target Fields (Xu, Tong and
Jaakkola 2023, arXiv 2302.00670, equation 5) and, with the whole data set as references, the exact
minimiser of denoising score matching on it.

Two matrix products and a softmax by running maximum and sum: memory is B·chunk + B·d, never B·n·d,
and chunked equals dense up to rounding. Weights below e^-60 are set to zero: as denormal numbers
they make the second product twice as slow and change nothing.

If the sample that made x_t is given as ``own``, the mean is formed as a shift from it, weighted by
the other references alone, so that at low noise the shift and the spread keep their relative
precision.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vr.references import PlainReferences, References, check_samples

_NEGLIGIBLE = -60.0
"""Log weight relative to the largest below which a weight is set to zero."""


class Posterior(NamedTuple):
    """The posterior of x0 given x_t under the references.

    Attributes:
        mean: ``E[x0 | x_t]``, ``(B, *)``.
        ess: Effective number of references ``(Σ w)² / Σ w²``, ``(B,)``.
        spread: ``tr Cov[x0 | x_t]``, x0 units squared, ``(B,)``.
        log_evidence: ``log p(x_t)``, the references equally likely, ``(B,)``; rounding errors are
            relative to ``‖x_t‖² / 2 sigma²``, which is large at low noise.
    """

    mean: Tensor
    ess: Tensor
    spread: Tensor
    log_evidence: Tensor


class _Sums:
    """Running softmax sums over references other than a pivot row, per query."""

    def __init__(self, maximum: Tensor, dim: int) -> None:
        self.maximum = maximum
        self.weight = torch.zeros_like(maximum)
        self.weight_squared = torch.zeros_like(maximum)
        self.rows = maximum.new_zeros(len(maximum), dim)
        self.squared_norms = torch.zeros_like(maximum)
        self.count = torch.zeros_like(maximum)

    def add(self, logits: Tensor, rows: Tensor, squared_norms: Tensor) -> None:
        """Add references by their ``logits (B, c)``, which are overwritten."""
        self.count += (logits > -math.inf).sum(1)
        maximum = torch.maximum(self.maximum, logits.amax(1))
        finite = torch.where(maximum == -math.inf, 0, maximum)
        decay = torch.exp(self.maximum - finite)
        # where exp underflows it takes thirty times as long
        weights = logits.sub_(finite[:, None]).clamp_(min=_NEGLIGIBLE - 1).exp_()
        weights = torch.threshold_(weights, math.exp(_NEGLIGIBLE), 0)

        self.maximum = maximum
        self.weight.mul_(decay).add_(weights.sum(1))
        self.weight_squared.mul_(decay**2).add_(torch.linalg.vecdot(weights, weights))
        self.rows.mul_(decay[:, None]).addmm_(weights, rows)
        self.squared_norms.mul_(decay).addmv_(weights, squared_norms)


@torch.no_grad()
def posterior_mean(
    xt: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    references: Tensor | References,
    *,
    own: Tensor | None = None,
    exclude: Tensor | None = None,
    query_group: Tensor | None = None,
    reference_group: Tensor | None = None,
    chunk_size: int | None = None,
) -> Posterior:
    """Return mean, effective sample size, spread and evidence of x0 given x_t.

    Computed in float32, or float64 if an input is, whatever autocast says; without gradient.

    Args:
        xt: Noised samples ``(B, *)``.
        alpha: Scale of the sample, ``(B,)`` or a number.
        sigma: Scale of the noise, ``(B,)`` or a number, positive.
        references: ``(n, *)``, or prepared by ``References.prepare`` for many calls.
        own: The samples that made x_t ``(B, *)``: each a reference of its own row, besides
            ``references``.
        exclude: For each row the position of one reference that it must not use ``(B,)``, int64,
            -1 for none: where a copy of ``own`` stands.
        query_group: Labels of the rows ``(B,)``; a negative one uses all references.
        reference_group: Labels of the references ``(n,)``; taken from prepared ones if not given.
        chunk_size: Number of references at a time; by default what keeps temporaries at a few MB.

    Raises:
        ValueError: On complex or integer samples, shapes that do not fit, a number sigma that is
            not positive, or a row that is left without a reference.
    """
    check_samples("xt", xt)
    prepared = _as_references(xt, references, reference_group)
    _check(xt, sigma, prepared, own, query_group, chunk_size)
    dtype = _work_dtype(xt.dtype, prepared.centre.dtype)
    with torch.autocast(xt.device.type, enabled=False):
        centre = prepared.centre.to(dtype)
        alpha = _per_row(alpha, xt, dtype)
        precision = _per_row(sigma, xt, dtype) ** -2
        query = xt.flatten(1).to(dtype) - alpha[:, None] * centre
        slope, curvature = alpha * precision, 0.5 * alpha**2 * precision

        pivot = query.new_zeros(1, 1) if own is None else own.flatten(1).to(dtype) - centre
        pivot_norm = torch.linalg.vecdot(pivot, pivot)
        own_logit = slope * torch.linalg.vecdot(query, pivot) - curvature * pivot_norm
        own_logit = own_logit if own is not None else torch.full_like(slope, -math.inf)

        sums, scaled = _Sums(own_logit, query.shape[1]), slope[:, None] * query
        for start, rows, norms in prepared.chunks(chunk_size, len(xt), dtype):
            logits = (scaled @ rows.T).addr_(curvature, norms, alpha=-1)
            _mask(logits, start, exclude, query_group, prepared.group)
            sums.add(logits, rows, norms)

        if own is None and query_group is not None:
            _check_every_row_has_a_reference(sums.count, query_group)
        base = centre if own is None else own.flatten(1).to(dtype)
        log_density = -0.5 * precision * torch.linalg.vecdot(query, query)
        log_density += 0.5 * query.shape[1] * torch.log(precision / (2 * math.pi))
        return _finish(sums, own_logit, pivot, pivot_norm, base, log_density, xt)


def _finish(
    sums: _Sums,
    own_logit: Tensor,
    pivot: Tensor,
    pivot_norm: Tensor,
    base: Tensor,
    log_density: Tensor,
    xt: Tensor,
) -> Posterior:
    own_weight = torch.exp(own_logit - sums.maximum)
    weight = sums.weight + own_weight

    shift = (sums.rows - sums.weight[:, None] * pivot) / weight[:, None]
    ess = weight**2 / (sums.weight_squared + own_weight**2)
    second = sums.squared_norms - 2 * torch.linalg.vecdot(pivot, sums.rows)
    second = (second + sums.weight * pivot_norm) / weight
    spread = (second - torch.linalg.vecdot(shift, shift)).clamp(min=0)
    count = sums.count + (own_logit > -math.inf)
    log_evidence = sums.maximum + torch.log(weight) - torch.log(count) + log_density
    return Posterior((base + shift).reshape(xt.shape), ess, spread, log_evidence)


def _check_every_row_has_a_reference(count: Tensor, query_group: Tensor) -> None:
    if bool((count == 0).any()):
        row = int((count == 0).nonzero()[0])
        raise ValueError(
            f"Argument `query_group` leaves row {row} (group {int(query_group[row])}) without "
            f"a reference: give references of that group, or `own`."
        )


def _mask(
    logits: Tensor,
    start: int,
    exclude: Tensor | None,
    query_group: Tensor | None,
    reference_group: Tensor | None,
) -> None:
    if exclude is not None:
        position = exclude - start
        inside = (position >= 0) & (position < logits.shape[1])
        position = position.clamp(0, logits.shape[1] - 1)[:, None]
        kept = torch.where(inside[:, None], -math.inf, logits.gather(1, position))
        logits.scatter_(1, position, kept)
    if query_group is not None and reference_group is not None:
        part = reference_group[start : start + logits.shape[1]]
        foreign = (query_group[:, None] != part) & (query_group[:, None] >= 0)
        logits.masked_fill_(foreign, -math.inf)


def _as_references(
    xt: Tensor, references: Tensor | References, group: Tensor | None
) -> References | PlainReferences:
    if isinstance(references, References):
        if group is None:
            return references
        return References(references.rows, references.squared_norms, references.centre, group)
    check_samples("references", references)
    return PlainReferences(references.flatten(1), group, _work_dtype(xt.dtype, references.dtype))


def _work_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _per_row(value: Tensor | float, xt: Tensor, dtype: torch.dtype) -> Tensor:
    row = torch.as_tensor(value, dtype=dtype, device=xt.device)
    return row.reshape(-1).expand(len(xt))


def _check(
    xt: Tensor,
    sigma: Tensor | float,
    references: References | PlainReferences,
    own: Tensor | None,
    query_group: Tensor | None,
    chunk_size: int | None,
) -> None:
    if xt[0].numel() != len(references.centre):
        raise ValueError(
            f"Argument `references` expected to have {xt[0].numel()} values per row, as `xt` "
            f"{tuple(xt.shape)} has, but got {len(references.centre)}."
        )
    if own is not None and own.shape != xt.shape:
        raise ValueError(
            f"Argument `own` expected to have the shape of `xt`, {tuple(xt.shape)}, "
            f"but got {tuple(own.shape)}."
        )
    if isinstance(sigma, (int, float)) and not 0 < sigma < math.inf:
        raise ValueError(f"Argument `sigma` expected to be positive and finite, but got {sigma}.")
    if query_group is not None and references.group is None:
        raise ValueError("Argument `query_group` needs `reference_group`: the references' labels.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"Argument `chunk_size` expected to be at least 1, but got {chunk_size}.")
