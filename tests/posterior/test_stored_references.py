"""References in bfloat16, in 8 bits and in files, against those in float32 in memory."""

import copy
import pickle

import pytest
import torch

from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.posterior.stored_references import StoredReferences, as_numbers, as_stored

COUNT, DIM, QUERIES = 500, 48, 12


def problem(levels=None):
    """Queries, noise levels, references and classes."""
    source = torch.Generator().manual_seed(4)
    x = torch.randn(COUNT, DIM, generator=source)
    if levels is not None:
        x = torch.randint(levels, (COUNT, DIM), generator=source).float() / 127.5 - 1
    sigma = torch.logspace(-1, 1, QUERIES)
    xt = x[:QUERIES] + sigma[:, None] * torch.randn(QUERIES, DIM, generator=source)
    return xt, sigma, x, torch.arange(COUNT) % 3


def own_of(x, group):
    at = torch.arange(QUERIES)
    return {"own": x[at], "exclude": at, "query_group": group[at]}


def in_parts(x):
    return [x[:100], x[100:101], x[101:350], x[350:]]


@pytest.mark.parametrize("chunk_size", [None, 64, 500])
def test_parts_are_the_references_that_they_make_together(chunk_size):
    xt, sigma, x, group = problem()
    whole, parts = References.prepare(x, group), StoredReferences.prepare(in_parts(x), group)
    assert len(parts) == COUNT
    given = own_of(x, group)
    expected = posterior_mean(xt, 1.0, sigma, whole, **given)
    for _ in range(2):  # the second time begins with what was read ahead
        found = posterior_mean(xt, 1.0, sigma, parts, chunk_size=chunk_size, **given)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_interrupted_pass_and_another_size_read_the_right_rows():
    x = problem()[2]
    stored = StoredReferences.prepare(in_parts(x))
    for size in (200, 70, 70, 500, 200):
        rows = []
        for start, part, norms in stored.chunks(size, 1, torch.float32):
            assert start == sum(map(len, rows))
            torch.testing.assert_close(norms, part.square().sum(1))
            rows.append(part + stored.centre)
            if size == 200:
                break
        found = torch.cat(rows)
        torch.testing.assert_close(found, x[: len(found)])


def test_taken_references_are_those_at_the_positions():
    _, _, x, group = problem()
    stored = StoredReferences.prepare([as_stored(part, "bfloat16") for part in in_parts(x)], group)
    index = torch.tensor([350, 0, 99, 100, 101, 499, 0])
    taken = stored.take(index)
    torch.testing.assert_close(taken.rows + taken.centre, x[index].bfloat16().float())
    assert torch.equal(taken.group, group[index])
    torch.testing.assert_close(taken.squared_norms, taken.rows.square().sum(1))


def test_pixels_of_eight_bits_lose_nothing():
    xt, sigma, x, group = problem(levels=256)
    stored = as_stored(x, "uint8")
    assert stored.dtype == torch.uint8
    torch.testing.assert_close(as_numbers(stored), x, rtol=0, atol=1e-7)
    found = posterior_mean(
        xt, 1.0, sigma, StoredReferences.prepare([stored], group), **own_of(x, group)
    )
    expected = posterior_mean(xt, 1.0, sigma, References.prepare(x, group), **own_of(x, group))
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-4)


def test_samples_beyond_pixels_are_refused_in_eight_bits():
    with pytest.raises(ValueError, match=r"`dtype` must be .* got 'uint8' and samples up to 1.5"):
        as_stored(torch.tensor([[0.5, -1.5]]), "uint8")


def mean_of_targets(xt, sigma, x, bank):
    """E of the target over which of all samples made x_t, with its exact tensor as own: ``(d,)``.

    Also the exact posterior mean and weights.
    """
    count = len(x)
    targets = posterior_mean(
        xt.expand(count, -1), 1.0, float(sigma), bank, own=x, exclude=torch.arange(count)
    ).mean.double()
    logits = -(xt.double() - x.double()).square().sum(1) / (2 * float(sigma) ** 2)
    weights = logits.softmax(0)
    return weights @ targets, weights @ x.double(), weights


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.5, 5.0, 50.0])
def test_the_bias_of_rounded_references_is_that_of_the_formula(sigma):
    """Of each x_t all samples are own in turn, so nothing is left to chance."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=source)
    # neighbours share the weight at low noise too
    x[20:] = x[:20] + sigma * torch.randn(20, 16, generator=source) / 4
    rounded = as_stored(x, "bfloat16")
    delta = rounded.double() - x.double()
    assert float((delta.abs() / x.abs()).max()) <= 2**-8
    for i in range(6):
        xt = x[i] + sigma * torch.randn(16, generator=source)
        found, exact, w = mean_of_targets(xt, sigma, x, StoredReferences.prepare([rounded]))
        same = mean_of_targets(xt, sigma, x, References.prepare(x))[0]

        away = xt.double() - x.double()
        shift = ((away * delta).sum(1) - delta.square().sum(1) / 2) / sigma**2
        terms = (w * (1 - w))[:, None] * (delta + shift[:, None] * (x.double() - exact))
        bias = found - exact
        torch.testing.assert_close(same, exact, rtol=0, atol=1e-5)
        # what is left is of second order
        assert float((bias - terms.sum(0)).norm()) < 0.15 * float(bias.norm()) + 1e-5
        assert 0 < float(bias.norm()) < float(delta.norm(dim=1).max())


def test_copies_share_what_is_stored_and_read_anew():
    xt, sigma, x, _ = problem()
    stored = StoredReferences.prepare(in_parts(x))
    expected = posterior_mean(xt, 1.0, sigma, stored).mean
    assert copy.deepcopy(stored) is stored
    again = pickle.loads(pickle.dumps(stored)).to(torch.device("cpu"))
    assert torch.equal(posterior_mean(xt, 1.0, sigma, again).mean, expected)
