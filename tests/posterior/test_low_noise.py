"""Near-duplicates at low noise: what float32 must tell apart in products that it rounds."""

import math
import runpy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lightning_vr.core import devices
from lightning_vr.posterior import low_noise, streamed_softmax
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.posterior.references import References

WIDE = torch.float64
COUNT, QUERIES = 12, 6
TABLE = [(55, 0.002), (55, 0.01), (30, 0.01), (55, 0.05)]
TENSOR_CORES = Path(__file__).parents[2] / "examples/scale/tensor_cores.py"


@pytest.fixture
def tensor_cores(monkeypatch):
    """Multiply as the kernel does in tensor cores, whose sums are cut off."""
    product = runpy.run_path(str(TENSOR_CORES))["as_kernel"]
    calls = []

    @contextmanager
    def emulated(x):
        calls.append(x)
        yield product

    monkeypatch.setattr(streamed_softmax, "exact_products", emulated)
    yield
    assert calls


def near_duplicates(norm, sigma, distance=2.0, copies=1, alpha=1.0, dim=3072):
    """Queries, their samples' positions, and samples with others ``distance`` sigmas away."""
    source = torch.Generator().manual_seed(5)

    def directions(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape, dim, generator=source), dim=-1)

    x = norm * directions(COUNT)
    near = x + distance * sigma / alpha * directions(copies, COUNT)
    own = torch.arange(QUERIES)
    xt = alpha * x[own] + sigma * torch.randn(QUERIES, dim, generator=source)
    return xt, own, torch.cat([x, *near])


def in_float64(xt, alpha, sigma, references, allowed=None):
    """Mean, ess, spread and log evidence by distances, for the inputs as float32 has them."""
    dim, xt, references = xt.shape[1], xt.double(), references.double()
    alpha, sigma = (float(torch.tensor(x, dtype=torch.float32)) for x in (alpha, sigma))
    logits = -(xt[:, None] - alpha * references).square().sum(2) / (2 * sigma**2)
    allowed = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed
    logits = logits.masked_fill(~allowed, -math.inf)
    weights = logits.softmax(1)
    mean = weights @ references
    spread = (weights * (references - mean[:, None]).square().sum(2)).sum(1)
    density = logits.logsumexp(1) - 0.5 * dim * math.log(2 * math.pi * sigma**2)
    ess = 1 / weights.square().sum(1)
    return mean, ess, spread, density - torch.log(allowed.sum(1))


def assert_right(found, expected, scale):
    """Weights to 1e-3, the mean to that in units of ``scale``, the spread in its square."""
    mean, ess, spread, log_evidence = expected
    assert float((found.ess.double() - ess).abs().max()) < 1e-3
    assert float((found.mean.double() - mean).norm(dim=1).max()) < 2.5e-3 * scale
    torch.testing.assert_close(found.spread.double(), spread, rtol=1e-3, atol=1e-2 * scale**2)
    torch.testing.assert_close(found.log_evidence.double(), log_evidence, rtol=0, atol=5e-3)


@pytest.mark.parametrize("prepare", [References.prepare, lambda x: x], ids=["prepared", "plain"])
@pytest.mark.parametrize(("norm", "sigma"), TABLE)
def test_weights_of_two_near_duplicates_are_right_to_one_in_a_thousand(norm, sigma, prepare):
    xt, own, x = near_duplicates(norm, sigma)
    expected = in_float64(xt, 1.0, sigma, x)
    assert 1.02 < float(expected[1].mean()) < 1.9
    for given in ({}, {"own": x[own], "exclude": own}):
        for size in (None, 5):
            found = posterior_mean(xt, 1.0, sigma, prepare(x), chunk_size=size, **given)
            assert_right(found, expected, sigma)


@pytest.mark.parametrize(("norm", "sigma"), TABLE)
def test_they_are_as_right_with_the_arithmetic_of_tensor_cores(norm, sigma, tensor_cores):
    xt, own, x = near_duplicates(norm, sigma)
    given = {"own": x[own], "exclude": own}
    assert_right(posterior_mean(xt, 1.0, sigma, x, **given), in_float64(xt, 1.0, sigma, x), sigma)


@pytest.mark.parametrize("sigma", [1.0, 4.0, 8.0])
def test_weights_of_images_are_right_to_1e_5_with_it(sigma, tensor_cores):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 4, 4, generator=source)
    x = torch.nn.functional.interpolate(x, size=32, mode="bilinear").flatten(1)
    own = torch.arange(4)
    xt = x[own] + sigma * torch.randn(4, 3072, generator=source)
    found = posterior_mean(xt, 1.0, sigma, References.prepare(x), own=x[own], exclude=own)
    expected = in_float64(xt, 1.0, sigma, x)
    means = torch.stack([found.mean.double(), expected[0]]).flatten(0, 1)
    found, expected = torch.linalg.lstsq(x.double().T, means.T).solution.T.chunk(2)
    torch.testing.assert_close(expected.sum(1), torch.ones(4, dtype=WIDE))
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("alpha", [0.05, 0.7])
@pytest.mark.parametrize(("sigma", "copies"), [(0.002, 9), (0.3, 3), (1.0, 1)])
def test_many_near_duplicates_are_told_apart_at_any_scale(alpha, sigma, copies):
    xt, own, x = near_duplicates(20 / alpha, sigma, 1.0, copies, alpha, dim=192)
    expected = in_float64(xt, alpha, sigma, x)
    for given in ({}, {"own": x[own], "exclude": own, "chunk_size": 7}):
        found = posterior_mean(xt, alpha, sigma, References.prepare(x), **given)
        assert_right(found, expected, sigma / alpha)


@pytest.mark.parametrize("piece", [1, 4])
def test_differences_may_be_formed_piece_by_piece(monkeypatch, piece):
    xt, _, x = near_duplicates(20, 0.01, copies=3, dim=48)
    whole = posterior_mean(xt, 1.0, 0.01, x)
    monkeypatch.setattr(low_noise, "_DIFFERENCES", 48 * piece)
    for one, other in zip(whole, posterior_mean(xt, 1.0, 0.01, x), strict=True):
        assert torch.equal(one, other)


def test_products_in_float32_alone_are_wrong_there(monkeypatch):
    """Else the tests above would show nothing."""
    xt, _, x = near_duplicates(55, 0.002)
    monkeypatch.setattr(low_noise, "_TOLERANCE", math.inf)
    found = posterior_mean(xt, 1.0, 0.002, x)
    assert float((found.ess.double() - in_float64(xt, 1.0, 0.002, x)[1]).abs().max()) > 0.1


def test_the_host_need_not_wait_for_what_is_near(monkeypatch):
    """As on an accelerator: a fixed number of candidates for each row, also of those left alone."""
    sigma = torch.tensor([0.002, 0.002, 0.01, 0.01, 3.0, 30.0])
    xt, own, x = near_duplicates(55, 0.002, copies=3, dim=192)
    xt = x[own] + (xt - x[own]) * (sigma / 0.002)[:, None]
    given = {"own": x[own], "exclude": own, "chunk_size": 13}
    expected = posterior_mean(xt, 1.0, sigma, x, **given)

    monkeypatch.setattr(devices, "host_waits", lambda device: True)
    for one, other in zip(posterior_mean(xt, 1.0, sigma, x, **given), expected, strict=True):
        torch.testing.assert_close(one[:4], other[:4])
        assert torch.equal(one[4:], other[4:])


def test_rows_at_higher_noise_are_bitwise_those_of_products_alone(monkeypatch):
    sigma = torch.tensor([0.002, 0.01, 1.0, 2.0, 10.0, 100.0])
    xt, own, x = near_duplicates(55, 0.002, copies=2, dim=192)
    xt = x[own] + (xt - x[own]) * (sigma / 0.002)[:, None]
    for given in ({}, {"own": x[own], "exclude": own, "chunk_size": 9}):
        found = posterior_mean(xt, 1.0, sigma, x, **given)
        with monkeypatch.context() as patch:
            patch.setattr(low_noise, "_TOLERANCE", math.inf)
            products = posterior_mean(xt, 1.0, sigma, x, **given)
        for one, other in zip(found, products, strict=True):
            assert torch.equal(one[3:], other[3:])
        assert not torch.equal(found.log_evidence[:2], products.log_evidence[:2])


def test_masked_near_duplicates_have_no_weight():
    xt, own, x = near_duplicates(55, 0.002, copies=4, dim=192)
    group = torch.arange(len(x)) // COUNT % 3
    query = group[own].index_fill(0, torch.tensor([3]), -1)
    excluded = own + COUNT * 3
    options = {"query_group": query, "reference_group": group, "exclude": excluded}
    found = posterior_mean(xt, 1.0, 0.002, x, chunk_size=17, **options)
    allowed = (group == query[:, None]) | (query[:, None] < 0)
    allowed &= torch.arange(len(x)) != excluded[:, None]
    assert_right(found, in_float64(xt, 1.0, 0.002, x, allowed), 0.002)


def test_equal_references_share_the_weight():
    xt, _, x = near_duplicates(55, 1e-4, distance=0.0, copies=3)
    found = posterior_mean(xt, 1.0, 1e-4, x)
    torch.testing.assert_close(found.ess, torch.full((QUERIES,), 4.0))
    assert float(found.spread.max()) < 1e-10


def test_references_in_far_clusters_are_told_apart():
    """All of a cluster are near, and the mean is that of its products with what is left of x_t."""
    source = torch.Generator().manual_seed(2)
    centres = torch.tensor([500.0, -500.0]).repeat_interleave(20)[:, None]
    x = 0.1 * torch.randn(40, 8, generator=source) + centres / math.sqrt(8)
    xt = x[::7] + 0.05 * torch.randn(6, 8, generator=source)
    found = posterior_mean(xt, 1.0, 0.05, x)
    mean, ess, spread, _ = in_float64(xt, 1.0, 0.05, x)
    torch.testing.assert_close(found.mean.double(), mean, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.ess.double(), ess, rtol=0.02, atol=0)
    torch.testing.assert_close(found.spread.double(), spread, rtol=0.02, atol=1e-5)


def test_queries_without_signal_have_no_logits_to_correct():
    xt, _, x = near_duplicates(55, 0.01, dim=48)
    found = posterior_mean(xt, 0.0, 0.01, x)
    torch.testing.assert_close(found.ess, torch.full((QUERIES,), 2.0 * COUNT))
    torch.testing.assert_close(found.mean, x.mean(0).expand(QUERIES, 48))
