"""The posterior mean of x0 given x_t under a set of references: a streamed softmax.

Under ``x_t = alpha x0 + sigma noise`` and x0 uniform on references ``r_1 .. r_n``,

    E[x0 | x_t] = Σ_k w_k r_k,   w = softmax(ℓ),
    ℓ_k = (alpha/sigma²) x_t·r_k - (alpha²/2sigma²) ‖r_k‖²

(‖x_t‖² is common to all k and drops out). It is the target of Stable Target Fields (Xu, Tong and
Jaakkola 2023, arXiv 2302.00670, equation 5) and, with the whole data set as references, the exact
minimiser of denoising score matching on it.

Two matrix products and a softmax by running maximum and sum: memory is B·chunk + B·d, never B·n·d,
and chunked equals dense up to rounding.

If the sample that made x_t is given as ``own``, the mean is formed as a shift from it, weighted by
the other references alone, so that small shifts and spreads keep their digits. At low noise the
logits of near-duplicates are formed from differences (``low_noise.py``): at norm 55 and noise 0.002
weights are right to 1e-3, and the spread to 1e-2 sigma²/alpha². Elsewhere no bit differs.

References may be sharded over ranks: each sums over its shard for the queries of all. The rank of
a query adds ``own``, of which the others know only the logit.
"""

import math
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_vr.core.validation import check_at_least, check_positive, check_samples
from lightning_vr.posterior.low_noise import rough_offset
from lightning_vr.posterior.references import PlainReferences, References, columns
from lightning_vr.posterior.sharded_references import Bank, ShardedReferences, sums_over_ranks
from lightning_vr.posterior.stored_references import StoredReferences
from lightning_vr.posterior.streamed_softmax import Queries, SoftmaxSums

Prepared: TypeAlias = Bank | PlainReferences

_LARGE = 1e30
_SIGMA = 1e-18, 1e18


class Posterior(NamedTuple):
    """The posterior of x0 given x_t under the references.

    Attributes:
        mean: ``E[x0 | x_t]``, ``(B, *)``.
        ess: Effective number of references ``(Σ w)² / Σ w²``, ``(B,)``.
        spread: ``tr Cov[x0 | x_t]``, x0 units squared, ``(B,)``.
        log_evidence: ``log p(x_t)``, the references equally likely, ``(B,)``.
    """

    mean: Tensor
    ess: Tensor
    spread: Tensor
    log_evidence: Tensor


@torch.no_grad()
def posterior_mean(
    xt: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    references: Tensor | Bank,
    *,
    own: Tensor | None = None,
    exclude: Tensor | None = None,
    query_group: Tensor | None = None,
    reference_group: Tensor | None = None,
    chunk_size: int | None = None,
) -> Posterior:
    """Return mean, effective sample size, spread and evidence of x0 given x_t.

    Computed in float32, or float64 if an input is, whatever autocast says; without gradient.

    If the references are sharded over ranks, all ranks must call it, each with its own queries.
    Their number B may differ; a rank without queries calls it with B of 0.

    Args:
        xt: Noised samples ``(B, *)``.
        alpha: Scale of the sample, ``(B,)`` or a number.
        sigma: Scale of the noise, ``(B,)`` or a number, positive.
        references: ``(n, *)``, or prepared by ``References.prepare`` for many calls, kept as stored
            by ``StoredReferences.prepare``, or sharded over ranks by ``ShardedReferences``.
        own: The samples that made x_t ``(B, *)``: each a reference of its own row, besides
            ``references``.
        exclude: For each row the position of one reference that it must not use ``(B,)``, int64,
            -1 for none: where a copy of ``own`` is.
        query_group: Labels of the rows ``(B,)``; a negative one uses all references. With k labels
            of each row ``(B, k)`` a reference must have each that is not negative.
        reference_group: Labels of the references ``(n,)`` or ``(n, k)``; taken from prepared ones
            if not given.
        chunk_size: Number of references at a time; by default, temporaries take a few MB.

    Raises:
        ValueError: On complex or integer samples, shapes that do not fit, a number sigma that is
            not positive or out of range, a row without a reference, or ranks whose queries differ
            in more than their number.
    """
    if len(xt) > 0 or not isinstance(references, ShardedReferences):
        check_samples("xt", xt)
    prepared = _as_references(xt, references, reference_group)
    _check(xt, sigma, prepared, own, query_group, chunk_size)
    dtype = _work_dtype(xt.dtype, prepared.local.centre.dtype)
    with torch.autocast(xt.device.type, enabled=False):
        centre = prepared.local.centre.to(dtype)
        alpha = _per_row(alpha, xt, dtype)
        precision = _per_row(sigma, xt, dtype) ** -2
        query = xt.flatten(1).to(dtype) - alpha[:, None] * centre
        slope, curvature = alpha * precision, 0.5 * alpha**2 * precision
        length = precision * torch.linalg.vecdot(query, query)
        offset = rough_offset(length, curvature, query.shape[1])
        nothing = torch.full_like(slope, -math.inf)
        scaled = slope[:, None] * query
        queries = Queries(scaled, curvature, offset, nothing, exclude, query_group)

        base = centre if own is None else own.flatten(1).to(dtype)
        pivot = query.new_zeros(1, 1) if own is None else base - centre
        pivot_norm = torch.linalg.vecdot(pivot, pivot)
        if own is not None:
            own_logit = slope * torch.linalg.vecdot(query, pivot) - curvature * pivot_norm
            low = queries.low_noise
            queries.own_logit = own_logit if low is None else low.own_logits(own_logit, pivot)
        if isinstance(prepared, ShardedReferences):
            sums = sums_over_ranks(prepared, queries, chunk_size)
        else:
            sums = SoftmaxSums.over(prepared, queries, chunk_size)

        if own is None and not (query_group is None and exclude is None):
            _check_every_row_has_a_reference(sums.count, query_group)
        log_density = offset - 0.5 * length
        log_density += 0.5 * query.shape[1] * torch.log(precision / (2 * math.pi))
        return _finish(sums, queries, pivot, pivot_norm, base, log_density, xt)


def _finish(
    sums: SoftmaxSums,
    queries: Queries,
    pivot: Tensor,
    pivot_norm: Tensor,
    base: Tensor,
    log_density: Tensor,
    xt: Tensor,
) -> Posterior:
    own_weight = torch.exp(queries.own_logit - sums.maximum)
    weight = sums.weight + own_weight

    shift = sums.weight[:, None] * pivot.expand_as(sums.rows)
    shift = torch.sub(sums.rows, shift, out=shift).div_(weight[:, None])
    ess = weight**2 / (sums.weight_squared + own_weight**2)
    second = sums.squared_norms - 2 * torch.linalg.vecdot(pivot, sums.rows)
    second = (second + sums.weight * pivot_norm) / weight
    spread = second - torch.linalg.vecdot(shift, shift)
    if queries.low_noise is not None and sums.logits is not None:
        own = own_weight * queries.own_logit.clamp(min=-_LARGE)  # no weight times -inf is NaN
        moments = (sums.logits + own) / weight, sums.squared_norms / weight
        spread = queries.low_noise.spread(spread, *moments, pivot, shift)
    count = sums.count + (queries.own_logit > -math.inf)
    log_evidence = sums.maximum + torch.log(weight) - torch.log(count) + log_density
    return Posterior((base + shift).reshape(xt.shape), ess, spread.clamp_(min=0), log_evidence)


def _check_every_row_has_a_reference(count: Tensor, query_group: Tensor | None) -> None:
    if bool((count == 0).any()):
        row = int((count == 0).nonzero()[0])
        if query_group is None:
            raise ValueError(
                f"`exclude` must leave each row a reference, got the only one for row {row}: give "
                f"more references, or `own`."
            )
        raise ValueError(
            f"`query_group` must leave each row a reference, got group "
            f"{query_group[row].tolist()} for row {row}, which no reference has: give references "
            f"of that group, or `own`."
        )


def _as_references(xt: Tensor, references: Tensor | Bank, group: Tensor | None) -> Prepared:
    if isinstance(references, ShardedReferences):
        if group is not None:
            raise ValueError(
                "`reference_group` must be None with sharded references, which have labels of "
                "their own: give it to `ShardedReferences.prepare`."
            )
        return references
    if isinstance(references, References | StoredReferences):
        return references if group is None else replace(references, group=group)
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
    references: Prepared,
    own: Tensor | None,
    query_group: Tensor | None,
    chunk_size: int | None,
) -> None:
    local = references.local
    if xt.shape[1:].numel() != len(local.centre):
        raise ValueError(
            f"`references` must have {xt.shape[1:].numel()} values per row, as `xt` "
            f"{tuple(xt.shape)} has, got {len(local.centre)}: use samples of one shape."
        )
    if own is not None and own.shape != xt.shape:
        raise ValueError(
            f"`own` must have the shape of `xt`, {tuple(xt.shape)}, got {tuple(own.shape)}: give "
            f"the sample of each row."
        )
    if isinstance(sigma, (int, float)):
        check_positive("sigma", sigma)
        if not _SIGMA[0] <= sigma <= _SIGMA[1]:
            raise ValueError(
                f"`sigma` must be between {_SIGMA[0]} and {_SIGMA[1]}, whose squares float32 "
                f"holds, got {sigma}: scale the samples."
            )
    if query_group is not None and local.group is None:
        raise ValueError(
            "`reference_group` must be given with `query_group`, got None: give the labels of the "
            "references, or leave out `query_group`."
        )
    if query_group is not None and local.group is not None:
        asked, known = columns(query_group).shape, columns(local.group).shape
        if asked != (len(xt), known[1]):
            raise ValueError(
                f"`query_group` must have {len(xt)} rows of {known[1]} labels, as many as the "
                f"references have, got {tuple(query_group.shape)}: give each row its labels."
            )
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)
