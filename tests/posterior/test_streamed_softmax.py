import math

import pytest
import torch

from lightning_vr.posterior.references import References
from lightning_vr.posterior.streamed_softmax import Queries, SoftmaxSums, label_mismatch

WIDE = torch.float64


def problem():
    """Queries of five rows and twelve references; the last row may use only three of these."""
    source = torch.Generator().manual_seed(3)
    references = torch.randn(12, 4, generator=source, dtype=WIDE)
    scaled = 3 * torch.randn(5, 4, generator=source, dtype=WIDE)
    own_logit = torch.tensor([-math.inf, 2.0, 50.0, -50.0, -math.inf], dtype=WIDE)
    group = (torch.arange(12) < 9).long()
    query = torch.tensor([-1, 1, 0, -1, 0])
    one = torch.ones(5, dtype=WIDE)
    queries = Queries(scaled, one, 0 * one, own_logit, group=query)
    return References.centred(references, torch.zeros(4, dtype=WIDE), group), queries


def by_hand(references, queries):
    """log Σ w, log Σ w², Σ w r / Σ w and Σ w ‖r‖² / Σ w, not one of them with a common scale."""
    logits = queries.scaled @ references.rows.T - references.squared_norms
    logits = logits.masked_fill(label_mismatch(queries.group, references.group), -math.inf)
    weights = logits.softmax(1)
    return [
        logits.logsumexp(1),
        (2 * logits).logsumexp(1),
        weights @ references.rows,
        weights @ references.squared_norms,
        torch.isfinite(logits).sum(1).to(WIDE),
    ]


def unscaled(sums):
    return [
        sums.maximum + sums.weight.log(),
        2 * sums.maximum + sums.weight_squared.log(),
        sums.rows / sums.weight[:, None],
        sums.squared_norms / sums.weight,
        sums.count,
    ]


@pytest.mark.parametrize("cuts", [(), (5,), (9,), (1, 2), (0, 4, 12)])
def test_sums_over_parts_merge_to_the_sums_over_all(cuts):
    """The last row has no reference before the tenth, and some parts are empty."""
    references, queries = problem()
    order = torch.arange(12).tensor_split(cuts)
    parts = [SoftmaxSums.over(references.take(part), queries, 2) for part in order]
    # on their way between ranks the sums are rows of one tensor
    first, *others = [SoftmaxSums.unpacked(part.packed()) for part in parts]
    for other in others:
        first.merge(other)
    for found, expected in zip(unscaled(first), by_hand(references, queries), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_row_without_a_reference_in_a_shard_has_sums_of_zero():
    references, queries = problem()
    sums = SoftmaxSums.over(references.take(torch.arange(9)), queries, None)
    assert sums.packed()[4].tolist() == [-math.inf, *[0] * 9]
