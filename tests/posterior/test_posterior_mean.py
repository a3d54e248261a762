import math

import pytest
import torch

from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import EDM, VP, RectifiedFlow

WIDE = torch.float64
TOLERANCE = {torch.float32: 1e-5, WIDE: 1e-8}


@pytest.fixture(params=["plain", "prepared"])
def hand_over(request):
    """How references are given: as a tensor or prepared."""
    return (lambda x: x) if request.param == "plain" else References.prepare


def brute_force(xt, alpha, sigma, references, allowed=None):
    """(mean, ess, spread, log_evidence) in float64 by distances, materialising (B, n, d)."""
    xt, references = xt.double().flatten(1), references.double().flatten(1)
    alpha, sigma = (
        torch.as_tensor(x, dtype=WIDE).expand(len(xt)).unsqueeze(1) for x in (alpha, sigma)
    )
    distances = xt[:, None] - alpha[:, :, None] * references
    logits = -distances.square().sum(2) / (2 * sigma**2)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    weights = logits.softmax(1)
    mean = weights @ references
    spread = (weights * (references - mean[:, None]).square().sum(2)).sum(1)
    ess = torch.exp(2 * logits.logsumexp(1) - (2 * logits).logsumexp(1))
    normalise = 0.5 * xt.shape[1] * torch.log(2 * math.pi * sigma[:, 0] ** 2)
    count = torch.isfinite(logits).sum(1)
    return mean, ess, spread, logits.logsumexp(1) - count.double().log() - normalise


def problem(count, n, dim, alpha, sigma, dtype=WIDE, seed=0):
    """References and queries that were made from some of them: (xt, own positions, references)."""
    source = torch.Generator().manual_seed(seed)
    references = 0.5 + torch.randn(n, dim, generator=source, dtype=WIDE)
    positions = torch.randint(n, (count,), generator=source)
    noise = torch.randn(count, dim, generator=source, dtype=WIDE)
    xt = alpha * references[positions] + sigma * noise
    return xt.to(dtype), positions, references.to(dtype)


def sizes(xt, sigma, references):
    """(‖r‖², ‖xt‖² / 2 sigma²) at their largest."""
    squares = (x.double().flatten(1).square().sum(1).max() for x in (references, xt))
    squared_norm, squared_query = (float(x) for x in squares)
    return squared_norm, squared_query / (2 * sigma**2)


def assert_posterior(found, expected, tolerance, squared_norm=1.0, log_scale=1.0):
    """Compare all four results with absolute errors in the units that they are sums of.

    ``squared_norm`` is the size of the references, ``log_scale`` that of ``‖xt‖² / 2 sigma²``.
    """
    mean, ess, spread, log_evidence = expected
    scale = float(mean.abs().max())
    torch.testing.assert_close(found.mean.double(), mean, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(found.ess.double(), ess, rtol=10 * tolerance, atol=0)
    atol = tolerance * max(1.0, squared_norm)
    torch.testing.assert_close(found.spread.double(), spread, rtol=10 * tolerance, atol=atol)
    atol = tolerance * max(1.0, log_scale)
    torch.testing.assert_close(found.log_evidence.double(), log_evidence, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
@pytest.mark.parametrize("dim", [1, 64, 49152])
@pytest.mark.parametrize("alpha", [1.0, 0.6, 1e-3, 0.0])
@pytest.mark.parametrize("sigma", [1e-4, 0.5, 8.0, 200.0, 1e4])
def test_two_points_have_the_closed_form_posterior_mean(hand_over, alpha, sigma, dim, dtype):
    source = torch.Generator().manual_seed(dim)
    point = torch.ones(dim, dtype=dtype)
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=dtype)[:, None]
    noise = torch.randn(3, dim, generator=source, dtype=dtype)
    xt = alpha * sign * point + sigma * noise

    posterior = posterior_mean(xt, alpha, sigma, hand_over(torch.stack([point, -point])))

    tanh = torch.tanh(alpha * xt.double().sum(1) / sigma**2)
    expected = tanh[:, None].expand(3, dim)
    torch.testing.assert_close(posterior.mean.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        posterior.spread.double() / dim, 1 - tanh**2, rtol=0, atol=TOLERANCE[dtype]
    )


VECTORS = [
    (EDM(), 1.0, 0.5, "x0", 0.46211716),
    (EDM(), 1.0, 0.5, "score", -0.03788284),
    (VP(), 0.75, 0.5, "x0", 0.80445480),
    (VP(), 0.75, 0.5, "epsilon", -0.23927307),
    (VP(), 0.75, 0.5, "v", -0.67409133),
    (VP(), 0.75, 0.5, "score", 0.39878845),
    (RectifiedFlow(), 1.0, 0.3, "x0", 0.53704957),
    (RectifiedFlow(), 1.0, 0.3, "velocity", -0.47409913),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (WIDE, 1e-8)])
@pytest.mark.parametrize("own", [1.0, -1.0])
@pytest.mark.parametrize(("schedule", "level", "x", "kind", "expected"), VECTORS)
def test_two_points_have_the_published_vectors_in_every_prediction(
    schedule, level, x, kind, expected, own, dtype, tolerance
):
    t = schedule.time(torch.tensor([level], dtype=dtype))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    xt, x0 = torch.tensor([[x]], dtype=dtype), torch.tensor([[own]], dtype=dtype)
    target = posterior_mean(xt, alpha, sigma, torch.tensor([[-1.0], [1.0]], dtype=dtype)).mean

    noise = (xt - alpha * x0) / sigma
    output = prediction(kind, schedule, t).output(x0, noise, target)
    # the notes give eight digits
    assert float(output) == pytest.approx(expected, abs=max(tolerance, 1.1e-8))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_many_references_approach_the_posterior_mean_of_a_gaussian_mixture(alpha, sigma, z_score):
    source = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=WIDE)
    centres = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [1.5, -2.0]], dtype=WIDE)
    stds = torch.tensor([0.3, 0.8, 0.5], dtype=WIDE)
    xt = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.0, 0.5]], dtype=WIDE)

    variance = (alpha * stds) ** 2 + sigma**2
    distances = (xt[:, None] - alpha * centres).square().sum(2)
    share = (weights.log() - variance.log() - distances / (2 * variance)).softmax(1)
    gain = alpha * stds**2 / variance
    means = centres + gain[:, None] * (xt[:, None] - alpha * centres)
    exact = (share[:, :, None] * means).sum(1)

    errors = []
    for _ in range(20):
        which = torch.multinomial(weights, 20_000, replacement=True, generator=source)
        noise = torch.randn(20_000, 2, generator=source, dtype=WIDE)
        references = centres[which] + stds[which, None] * noise
        errors.append(posterior_mean(xt, alpha, sigma, references).mean - exact)
    errors = torch.stack(errors).flatten(1)
    assert max(abs(z_score(column)) for column in errors.T) < 4
    assert float(errors.abs().max()) < 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (WIDE, 1e-8)])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.3), (0.8, 0.6), (0.5, 2.0), (1e-3, 1.0)])
@pytest.mark.parametrize("dim", [1, 2, 3072])
def test_all_results_agree_with_brute_force(hand_over, alpha, sigma, dim, dtype, tolerance):
    sigma = sigma * dim**0.5
    xt, _, references = problem(9, 33, dim, alpha, sigma, dtype)
    posterior = posterior_mean(xt, alpha, sigma, hand_over(references))
    assert all(result.dtype == dtype for result in posterior)
    expected = brute_force(xt, alpha, sigma, references)
    assert_posterior(posterior, expected, tolerance, *sizes(xt, sigma, references))


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0, 30.0, 100.0, 1e4])
def test_no_noise_level_makes_large_images_collapse_or_overflow(hand_over, sigma):
    xt, own, references = problem(6, 12, 49152, 1.0, sigma, torch.float32)
    posterior = posterior_mean(xt, 1.0, sigma, hand_over(references))
    expected = brute_force(xt, 1.0, sigma, references)
    assert_posterior(posterior, expected, 1e-5, *sizes(xt, sigma, references))
    if sigma <= 1:
        torch.testing.assert_close(posterior.mean, references[own])


def test_alpha_and_sigma_may_differ_from_row_to_row(hand_over):
    alpha = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=WIDE)
    sigma = torch.tensor([1e-3, 0.5, 3.0, 1e3], dtype=WIDE)
    xt, _, references = problem(4, 20, 5, 1.0, 0.5)
    posterior = posterior_mean(xt, alpha, sigma, hand_over(references))
    assert_posterior(posterior, brute_force(xt, alpha, sigma, references), 1e-8)


def test_without_signal_all_references_have_equal_weight(hand_over):
    xt, _, references = problem(4, 20, 3, 0.0, 2.0)
    posterior = posterior_mean(xt, 0.0, 2.0, hand_over(references))
    torch.testing.assert_close(posterior.mean, references.mean(0).expand(4, 3))
    torch.testing.assert_close(posterior.ess, torch.full((4,), 20.0, dtype=WIDE))
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(2.0).double())
    torch.testing.assert_close(posterior.log_evidence, normal.log_prob(xt).sum(1))


def test_bfloat16_inputs_are_computed_in_float32(hand_over):
    xt, _, references = problem(8, 40, 768, 0.8, 20.0, torch.bfloat16)
    posterior = posterior_mean(xt, 0.8, 20.0, hand_over(references))
    assert posterior.mean.dtype == torch.float32
    expected = brute_force(xt, 0.8, 20.0, references)
    assert_posterior(posterior, expected, 1e-5, *sizes(xt, 20.0, references))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(hand_over, dtype):
    xt, _, references = problem(8, 40, 300, 0.8, 10.0, dtype)
    plain = posterior_mean(xt, 0.8, 10.0, hand_over(references))
    with torch.autocast("cpu", torch.bfloat16):
        cast = posterior_mean(xt, 0.8, 10.0, hand_over(references))
    for x, y in zip(plain, cast, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (WIDE, 1e-12)])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 64, 1000])
def test_chunked_agrees_with_dense(hand_over, chunk_size, dtype, tolerance):
    xt, own, references = problem(9, 64, 20, 0.7, 2.0, dtype)
    group = torch.arange(64) % 3
    options = {
        "own": references[own],
        "exclude": own,
        "query_group": group[own],
        "reference_group": group,
    }
    for given in ({}, options):
        dense = posterior_mean(xt, 0.7, 2.0, hand_over(references), chunk_size=64, **given)
        parts = posterior_mean(xt, 0.7, 2.0, hand_over(references), chunk_size=chunk_size, **given)
        for x, y in zip(dense, parts, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=4 * tolerance)


def test_the_default_chunks_agree_with_dense():
    xt, _, references = problem(100, 5000, 600, 1.0, 25.0, torch.float32)
    assert len(list(References.prepare(xt).chunks(None, 1 << 14, torch.float32))) == 2
    dense = posterior_mean(xt, 1.0, 25.0, references, chunk_size=5000)
    for given in (references, References.prepare(references)):
        torch.testing.assert_close(
            posterior_mean(xt, 1.0, 25.0, given).mean, dense.mean, rtol=0, atol=1e-5
        )


def test_images_keep_their_shape(hand_over):
    xt, _, references = problem(4, 10, 48, 1.0, 3.0)
    flat = posterior_mean(xt, 1.0, 3.0, hand_over(references))
    images = posterior_mean(
        xt.reshape(4, 3, 4, 4), 1.0, 3.0, hand_over(references.reshape(10, 3, 4, 4))
    )
    assert images.mean.shape == (4, 3, 4, 4)
    assert torch.equal(images.mean.flatten(1), flat.mean)


@pytest.mark.parametrize("offset", [-1.0, 3.0, 1024.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (WIDE, 1e-13)])
def test_a_translation_of_the_data_translates_the_mean(hand_over, offset, dtype, tolerance):
    xt, own, references = problem(9, 40, 6, 0.5, 1.0, dtype)
    # multiples of 1/64 are translated without rounding
    xt, references = ((64 * x).round() / 64 for x in (xt, references))
    given = {"own": references[own], "exclude": own}
    there = {"own": references[own] + offset, "exclude": own}
    for here, moved in (({}, {}), (given, there)):
        still = posterior_mean(xt, 0.5, 1.0, hand_over(references), **here)
        away = posterior_mean(xt + 0.5 * offset, 0.5, 1.0, hand_over(references + offset), **moved)
        scale = 1 + abs(offset)
        torch.testing.assert_close(away.mean - offset, still.mean, rtol=0, atol=tolerance * scale)
        for x, y in zip(still[1:], away[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=100 * tolerance)


def test_the_order_of_references_does_not_matter(hand_over, source):
    xt, _, references = problem(9, 40, 6, 1.0, 1.0)
    order = torch.randperm(40, generator=source)
    first = posterior_mean(xt, 1.0, 1.0, hand_over(references))
    second = posterior_mean(xt, 1.0, 1.0, hand_over(references[order]))
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_two_copies_of_all_references_double_the_ess_and_nothing_else(hand_over):
    xt, _, references = problem(9, 40, 6, 1.0, 1.0)
    once = posterior_mean(xt, 1.0, 1.0, hand_over(references))
    twice = posterior_mean(xt, 1.0, 1.0, hand_over(references.repeat(2, 1)))
    torch.testing.assert_close(twice.mean, once.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twice.ess, 2 * once.ess, rtol=1e-12, atol=0)
    torch.testing.assert_close(twice.spread, once.spread, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twice.log_evidence, once.log_evidence, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
@pytest.mark.parametrize("sigma", [1e-4, 1.0, 1e4])
def test_one_reference_is_the_mean_bitwise(hand_over, sigma, dtype):
    xt, _, references = problem(1, 1, 7, 0.9, sigma, dtype)
    posterior = posterior_mean(xt, 0.9, sigma, hand_over(references))
    assert torch.equal(posterior.mean, references)
    assert float(posterior.ess) == 1
    assert float(posterior.spread) == 0


def test_equal_references_are_the_mean(hand_over):
    xt, _, _ = problem(5, 3, 7, 0.9, 0.1)
    same = torch.linspace(-1, 1, 7, dtype=WIDE).expand(12, 7)
    posterior = posterior_mean(xt, 0.9, 0.1, hand_over(same))
    torch.testing.assert_close(posterior.mean, same[:5], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(posterior.ess, torch.full((5,), 12.0, dtype=WIDE))
    assert float(posterior.spread.max()) < 1e-14


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_own_with_its_copy_excluded_equals_the_copy_among_the_references(hand_over, sigma):
    xt, own, references = problem(9, 30, 4, 0.8, sigma)
    among = posterior_mean(xt, 0.8, sigma, hand_over(references))
    apart = posterior_mean(xt, 0.8, sigma, hand_over(references), own=references[own], exclude=own)
    for x, y in zip(among, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_own_without_exclude_is_one_more_reference(hand_over):
    xt, _, references = problem(5, 30, 4, 0.8, 1.0)
    own = xt / 0.8
    posterior = posterior_mean(
        xt, 0.8, 1.0, hand_over(references), own=own, exclude=torch.full((5,), -1)
    )
    for i in range(5):
        row = brute_force(xt[i : i + 1], 0.8, 1.0, torch.cat([references, own[i : i + 1]]))
        found = type(posterior)(*(result[i : i + 1] for result in posterior))
        assert_posterior(found, row, 1e-10)


def test_exclude_removes_one_reference_of_each_row(hand_over):
    xt, _, references = problem(5, 8, 3, 1.0, 1.0)
    exclude = torch.tensor([0, 7, -1, 3, 3])
    allowed = torch.arange(8) != exclude[:, None]
    for chunk_size in (None, 3):
        posterior = posterior_mean(
            xt, 1.0, 1.0, hand_over(references), exclude=exclude, chunk_size=chunk_size
        )
        assert_posterior(posterior, brute_force(xt, 1.0, 1.0, references, allowed), 1e-10)


def test_a_sample_with_only_its_copy_as_reference_is_the_mean_bitwise(hand_over):
    xt, own, references = problem(1, 1, 5, 1.0, 3.0, torch.float32)
    posterior = posterior_mean(xt, 1.0, 3.0, hand_over(references), own=references, exclude=own)
    assert torch.equal(posterior.mean, references)
    assert [float(posterior.ess), float(posterior.spread)] == [1, 0]


@pytest.mark.parametrize(("sigma", "largest"), [(1.2, 1e-7), (1.6, 1e-3), (2.5, 10.0)])
def test_at_low_noise_the_spread_keeps_its_relative_precision(hand_over, sigma, largest):
    xt, own, references = problem(32, 40, 64, 1.0, sigma, torch.float32)
    given = {"own": references[own], "exclude": own}
    single = posterior_mean(xt, 1.0, sigma, hand_over(references), **given).spread
    given["own"] = given["own"].double()
    wide = posterior_mean(xt.double(), 1.0, sigma, hand_over(references.double()), **given).spread
    assert 0 < float(wide.median()) < largest
    torch.testing.assert_close(single.double(), wide, rtol=1e-4, atol=1e-22)


def test_group_masks_are_separate_calls_for_each_group(hand_over):
    xt, own, references = problem(12, 30, 4, 0.9, 1.5)
    group = torch.arange(30) % 3
    query = group[own]
    for chunk_size in (None, 4):
        posterior = posterior_mean(
            xt,
            0.9,
            1.5,
            hand_over(references),
            query_group=query,
            reference_group=group,
            chunk_size=chunk_size,
        )
        for label in range(3):
            rows = query == label
            alone = posterior_mean(xt[rows], 0.9, 1.5, references[group == label])
            for whole, part in zip(posterior, alone, strict=True):
                torch.testing.assert_close(whole[rows], part, rtol=1e-10, atol=1e-10)


def test_rows_without_a_label_use_all_references(hand_over):
    xt, own, references = problem(6, 30, 4, 0.9, 1.5)
    group = torch.arange(30) % 3
    query = torch.where(torch.arange(6) % 2 == 0, -1, group[own])
    posterior = posterior_mean(
        xt, 0.9, 1.5, hand_over(references), query_group=query, reference_group=group
    )
    allowed = (query[:, None] == group) | (query[:, None] < 0)
    assert_posterior(posterior, brute_force(xt, 0.9, 1.5, references, allowed), 1e-10)


def test_references_must_have_each_of_several_labels_that_is_not_negative(hand_over):
    xt, own, references = problem(6, 30, 4, 0.9, 1.5)
    group = torch.stack([torch.arange(30) % 3, torch.arange(30) // 2 % 2], dim=1)
    query = group[own]
    query[0, 0] = query[1, 1] = query[2, 0] = query[2, 1] = -1
    for chunk_size in (None, 4):
        posterior = posterior_mean(
            xt,
            0.9,
            1.5,
            hand_over(references),
            query_group=query,
            reference_group=group,
            chunk_size=chunk_size,
        )
        allowed = ((query[:, None] == group) | (query[:, None] < 0)).all(dim=2)
        assert allowed.sum(1).tolist()[:4] == [14, 10, 30, 5]
        assert_posterior(posterior, brute_force(xt, 0.9, 1.5, references, allowed), 1e-10)


def test_prepared_references_carry_their_groups():
    xt, own, references = problem(6, 30, 4, 0.9, 1.5)
    group = torch.arange(30) % 3
    prepared = References.prepare(references, group)
    plain = posterior_mean(xt, 0.9, 1.5, references, query_group=group[own], reference_group=group)
    carried = posterior_mean(xt, 0.9, 1.5, prepared, query_group=group[own])
    torch.testing.assert_close(carried.mean, plain.mean)


def test_taken_references_are_those_at_the_positions():
    xt, _, references = problem(6, 30, 4, 0.9, 1.5)
    index = torch.tensor([3, 3, 29, 0])
    taken = References.prepare(references, torch.arange(30)).take(index)
    assert len(taken) == 4
    assert torch.equal(taken.group, index)
    expected = brute_force(xt, 0.9, 1.5, references[index])
    assert_posterior(posterior_mean(xt, 0.9, 1.5, taken), expected, 1e-10)


def test_no_gradient_flows_through_the_target():
    xt, _, references = problem(3, 5, 2, 1.0, 1.0)
    posterior = posterior_mean(xt.requires_grad_(), 1.0, 1.0, references.requires_grad_())
    assert not any(result.requires_grad for result in posterior)


def test_inputs_are_left_as_they_are(hand_over):
    xt, own, references = problem(3, 5, 2, 1.0, 1.0)
    copies = xt.clone(), references.clone()
    posterior_mean(xt, 1.0, 1.0, hand_over(references), own=references[own], exclude=own)
    assert torch.equal(xt, copies[0])
    assert torch.equal(references, copies[1])


X, R = torch.zeros(2, 3), torch.zeros(4, 3)
TWO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("xt", "references", "options", "message"),
    [
        (X.cfloat(), R, {}, "`xt` must be a real floating-point tensor, got .*complex"),
        (X, R.long(), {}, "`references` must be a real floating-point .* got torch.int64"),
        (X[:0], R, {}, r"`xt` must have shape \(n, \*\) .* got \(0, 3\)"),
        (X, R[:0], {}, r"`references` must have shape .* got \(0, 3\)"),
        (torch.zeros(3), R, {}, r"`xt` must have shape .* got \(3,\)"),
        (X, R[:, :2], {}, "`references` must have 3 values per row, .* got 2"),
        (X, R, {"own": R}, r"`own` must .* \(2, 3\), got \(4, 3\)"),
        (
            X,
            R,
            {"query_group": TWO},
            "`reference_group` must be given with `query_group`, got None",
        ),
        (
            X,
            R,
            {"query_group": TWO, "reference_group": torch.zeros(4, 2)},
            r"`query_group` must have 2 rows of 2 labels, .* got \(2,\)",
        ),
        (X, R, {"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        (
            X,
            R,
            {"query_group": TWO + 5, "reference_group": torch.arange(4)},
            r"`query_group` must leave each row a reference, got group 5 for row 0",
        ),
        (
            X,
            R[:1],
            {"exclude": torch.tensor([-1, 0])},
            "`exclude` must leave each row a reference, got the only one for row 1",
        ),
    ],
)
def test_invalid_inputs_raise(xt, references, options, message):
    with pytest.raises(ValueError, match=message):
        posterior_mean(xt, 1.0, 1.0, references, **options)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 1e-30, 1e30])
def test_a_sigma_that_is_not_a_positive_number_of_float32_raises(sigma):
    number = str(sigma).replace("+", r"\+")
    with pytest.raises(ValueError, match=f"`sigma` must be (positive|between) .* got {number}"):
        posterior_mean(X, 1.0, sigma, R)
