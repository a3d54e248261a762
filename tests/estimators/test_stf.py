import logging
import math
from dataclasses import replace

import pytest
import torch
from support.covering_arrays import covering_array

from lightning_vr.core.rng import generator
from lightning_vr.core.types import UNLABELLED, Clean
from lightning_vr.estimators.draws import noise_samples
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import EDM
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.process.weightings import UnitWeighting

WIDE = torch.float64
EDGES = torch.tensor([-math.inf, -1.5, -0.5, 0.5, 1.5, math.inf], dtype=WIDE)


def noised_at(clean, sigma, source):
    t = torch.full((len(clean.x0),), sigma, dtype=clean.x0.dtype)
    return noise_samples(clean, EDM(), t, torch.ones_like(t), source)


def two_gaussians(count, source, mean=1.0, std=0.5):
    """Samples of an equal mixture of N(±mean, std²) on the line."""
    sign = torch.randint(2, (count, 1), generator=source).to(WIDE) * 2 - 1
    return mean * sign + std * torch.randn(count, 1, generator=source, dtype=WIDE)


def two_gaussians_mean(xt, sigma, mean=1.0, std=0.5):
    """Their exact posterior mean (notes/stf.md, section 3)."""
    variance = std**2 + sigma**2
    tanh = torch.tanh(mean * xt / variance)
    return (1 - std**2 / variance) * tanh * mean + std**2 / variance * xt


def independent_sets(sets, size, source, sigma):
    """``sets`` reference sets of ``size`` samples in one batch: each is a class of its own."""
    group = torch.arange(sets).repeat_interleave(size)
    clean = Clean(two_gaussians(sets * size, source), group)
    return clean, noised_at(clean, sigma, source)


def mean_by_set(error, xt, size, query=None):
    """Mean over each set of ``error`` in each bin of x_t, and for each label: independent rows."""
    inside = torch.bucketize(xt[:, 0], EDGES[1:-1])[:, None] == torch.arange(5)
    if query is not None:
        inside = torch.cat([inside, query[:, None] == torch.arange(UNLABELLED, 3)], dim=1)
    return (error * inside).reshape(-1, size, inside.shape[1]).mean(1)


def largest(z_score, rows):
    """The largest |z| of the columns that hold anything."""
    return max(abs(z_score(column)) for column in rows.T if column.any())


CALLS = {1: 4, 2: 8, 4: 16, 16: 32, 64: 160}
"""Batches of 512 samples for each number of references."""


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", CALLS)
def test_the_target_is_unbiased_for_every_number_of_references(size, sigma, z_score):
    source = generator("unbiased", size)
    rows = []
    for _ in range(CALLS[size]):
        clean, noised = independent_sets(512 // size, size, source, sigma)
        target = STF()(noised, clean, source)
        error = target.x0 - two_gaussians_mean(noised.xt, sigma)
        rows.append(mean_by_set(error, noised.xt, size))
    assert largest(z_score, torch.cat(rows)) < 4


@pytest.mark.parametrize("size", [4, 16])
def test_leaving_the_own_sample_out_is_a_bias_that_the_same_test_finds(size, z_score):
    source, sigma = generator("leave one out"), 1.0
    rows = []
    for _ in range(CALLS[size]):
        clean, noised = independent_sets(512 // size, size, source, sigma)
        others = posterior_mean(
            noised.xt,
            1.0,
            sigma,
            clean.x0,
            exclude=torch.arange(512),
            query_group=clean.group,
            reference_group=clean.group,
        )
        error = others.mean - two_gaussians_mean(noised.xt, sigma)
        rows.append(mean_by_set(error, noised.xt, size))
    assert largest(z_score, torch.cat(rows)) > 5


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_two_references_halve_the_variance_on_the_two_point_set(sigma, z_score):
    source = generator("two points")
    group = torch.arange(10_000).repeat_interleave(2)
    signs = torch.randint(2, (20_000, 1), generator=source).to(WIDE) * 2 - 1
    clean = Clean(signs, group)
    noised = noised_at(clean, sigma, source)
    exact = torch.tanh(noised.xt / sigma**2)
    squared = (batch_target(clean, noised).x0 - exact).square()

    published = {0.5: 0.068597, 1.0: 0.4496, 2.0: 0.795946, 4.0: 0.941054}
    per_set = squared.reshape(-1, 2).mean(1)
    assert abs(z_score(per_set, published[sigma] / 2)) < 4


def batch_target(clean, noised):
    # 20,000 × 20,000 logits would not fit: 200 sets at a time
    parts = []
    for start in range(0, len(clean.x0), 400):
        rows = slice(start, start + 400)
        some = Clean(clean.x0[rows], clean.group[rows])
        fields = {
            name: getattr(noised, name)[rows]
            for name in ("xt", "x0", "noise", "t", "alpha", "sigma", "weight", "group")
        }
        parts.append(STF()(replace(noised, **fields), some, generator(0)))
    x0, ess, spread = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("x0", "ess", "spread")
    )
    return replace(parts[0], x0=x0, ess=ess, spread=spread)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", [2, 16])
def test_the_mean_spread_is_the_variance_removed(size, sigma, z_score):
    source = generator("spread", size)
    clean, noised = independent_sets(20_000 // size, size, source, sigma)
    target = batch_target(clean, noised)
    exact = two_gaussians_mean(noised.xt, sigma)
    removed = (noised.x0 - exact).square() - (target.x0 - exact).square()
    excess = (target.spread - removed[:, 0]).reshape(-1, size).mean(1)
    assert abs(z_score(excess)) < 4
    assert float(target.spread.mean()) > 0.01


def bank_problem(count=120):
    """A small data set: samples, and three labels that are correlated with them."""
    source = generator("bank")
    x0 = two_gaussians(count, source)
    label = (x0[:, 0] > torch.randn(count, generator=source)).long()
    return x0, label + (torch.arange(count) % 2)


def exact_mean(noised, x0, label, query):
    """The posterior mean of the whole data set, or of the row's class, by distances."""
    logits = -((noised.xt - x0.T) ** 2) / (2 * noised.sigma[:, None] ** 2)
    foreign = (query[:, None] != label) & (query[:, None] >= 0)
    return logits.masked_fill(foreign, -math.inf).softmax(1) @ x0


BANKS = {
    "count": [1, 2, 8, 64],
    "indexed": [True, False],
    "labels": ["none", "classes", "some dropped"],
}


def named(bank):
    return f"{bank['count']}-{'indexed' if bank['indexed'] else 'not indexed'}-{bank['labels']}"


@pytest.mark.parametrize("bank", covering_array(BANKS, 2, lambda _: True), ids=named)
def test_references_from_a_bank_are_unbiased(bank, z_score):
    check_bank(z_score, **bank)


@pytest.mark.slow
@pytest.mark.parametrize("bank", covering_array(BANKS, 3, lambda _: True), ids=named)
def test_references_from_every_bank_are_unbiased(bank, z_score):
    check_bank(z_score, **bank)


def check_bank(z_score, count, indexed, labels):
    x0, label = bank_problem()
    source = generator("bank draws", count)
    target = STF(references=count)
    target.fill(x0, None if labels == "none" else label, indexed=indexed)
    rows = []
    for _ in range(300):
        index = torch.randint(len(x0), (32,), generator=source)
        query = torch.full((32,), UNLABELLED) if labels == "none" else label[index]
        if labels == "some dropped":
            query = torch.where(torch.arange(32) % 2 == 0, UNLABELLED, query)
        clean = Clean(
            x0[index],
            None if labels == "none" else label[index],
            index=index if indexed else None,
        )
        noised = noised_at(clean, 1.0, source)
        noised = replace(noised, group=None if labels == "none" else query)
        error = target(noised, clean, source).x0 - exact_mean(noised, x0, label, query)
        rows.append(mean_by_set(error, noised.xt, 32, query))
    assert largest(z_score, torch.cat(rows)) < 4


@pytest.mark.parametrize("labels", ["classes", "some dropped"])
def test_references_from_a_batch_with_labels_are_unbiased(labels, z_score):
    x0, label = bank_problem()
    source = generator("batch draws")
    rows = []
    for _ in range(400):
        index = torch.randint(len(x0), (24,), generator=source)
        clean = Clean(x0[index], label[index])
        noised = noised_at(clean, 1.0, source)
        if labels == "some dropped":
            query = torch.where(torch.arange(24) % 2 == 0, UNLABELLED, noised.group)
            noised = replace(noised, group=query)
        error = STF()(noised, clean, source).x0 - exact_mean(noised, x0, label, noised.group)
        rows.append(mean_by_set(error, noised.xt, 24, noised.group))
    assert largest(z_score, torch.cat(rows)) < 4


def test_references_of_another_class_are_a_bias_that_the_same_test_finds(z_score):
    x0, label = bank_problem()
    source = generator("pooled")
    target = STF(references=16)
    target.fill(x0, None, indexed=True)
    rows = []
    for _ in range(300):
        index = torch.randint(len(x0), (32,), generator=source)
        clean = Clean(x0[index], index=index)
        noised = noised_at(clean, 1.0, source)
        error = target(noised, clean, source).x0 - exact_mean(noised, x0, label, label[index])
        rows.append(mean_by_set(error, noised.xt, 32, label[index]))
    assert largest(z_score, torch.cat(rows)) > 5


@pytest.mark.parametrize("labels", ["none", "classes", "some dropped"])
@pytest.mark.parametrize("references", ["all", 120])
def test_over_the_whole_data_set_the_target_is_the_exact_posterior_mean(references, labels):
    x0, label = bank_problem()
    source = generator("whole")
    target = STF(references=references)
    target.fill(x0, None if labels == "none" else label, indexed=True)
    index = torch.arange(120)
    clean = Clean(x0, None if labels == "none" else label, index=index)
    noised = noised_at(clean, 0.7, source)
    query = torch.full((120,), UNLABELLED) if labels == "none" else label
    if labels == "some dropped":
        query = torch.where(index % 3 == 0, UNLABELLED, query)
        noised = replace(noised, group=query)
    found = target(noised, clean, source)
    torch.testing.assert_close(found.x0, exact_mean(noised, x0, label, query))


def chosen(target, index, indexed=True, source=None):
    """How often each sample of a bank of unit vectors is in each row's references."""
    unit = torch.eye(target.bank.rows.shape[1], dtype=WIDE)
    clean = Clean(unit[index], index=index if indexed else None)
    # at infinite noise the target is the mean of the references
    noised = noised_at(clean, 1e9, source or generator("chosen"))
    found = target(noised, clean, source or generator("chosen"))
    size = target.references if isinstance(target.references, int) else len(unit)
    torch.testing.assert_close(found.ess, torch.full_like(found.ess, size), check_dtype=False)
    return size * found.x0


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not indexed"])
@pytest.mark.parametrize("references", [1, 2, 7, 30])
def test_exactly_the_stated_number_of_references_is_used_the_own_one_included(references, indexed):
    target = STF(references=references)
    target.fill(torch.eye(30, dtype=WIDE), None, indexed=indexed)
    index = torch.tensor([0, 3, 29, 3])
    counts = chosen(target, index, indexed)
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-6)
    assert counts.sum(1).round().tolist() == [references] * 4
    own = counts[torch.arange(4), index].round()
    assert (own >= 1).all()
    if indexed:
        assert own.tolist() == [1] * 4
        assert float(counts.max().round()) == 1


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not indexed"])
def test_every_other_sample_is_a_reference_equally_often(indexed, z_score):
    target = STF(references=4)
    target.fill(torch.eye(9, dtype=WIDE), None, indexed=indexed)
    source = generator("equally often")
    rows = [chosen(target, torch.tensor([2]), indexed, source)[0].round() for _ in range(600)]
    counts = torch.stack(rows)
    counts[:, 2] -= 1
    others = [0, 1, 3, 4, 5, 6, 7, 8]
    # 3 others: of the 8 without replacement, of all 9 with it
    expected = 3 / 8 if indexed else 3 / 9
    assert max(abs(z_score(counts[:, i], expected)) for i in others) < 4
    assert float(counts[:, 2].sum()) == 0 or not indexed


def test_with_several_draws_of_a_sample_each_batch_sample_is_one_reference(source):
    x0, label = torch.randn(6, 3, generator=source, dtype=WIDE), torch.tensor([0, 0, 1, 1, 1, 0])
    clean = Clean(x0, label)
    repeated = Clean(x0.repeat_interleave(2, 0), label.repeat_interleave(2))
    noised = noised_at(repeated, 1.0, source)
    found = STF()(noised, clean, source)

    logits = -(noised.xt[:, None] - x0).square().sum(2) / 2
    logits = logits.masked_fill(repeated.group[:, None] != label, -math.inf)
    torch.testing.assert_close(found.x0, logits.softmax(1) @ x0)


def test_the_own_sample_is_the_tensor_that_was_noised_whatever_the_bank_holds(source):
    """With random augmentation the bank holds another version of the own sample."""
    bank = torch.randn(20, 3, generator=source, dtype=WIDE)
    target = STF(references="all")
    target.fill(bank, None, indexed=True)
    index = torch.tensor([4, 11])
    clean = Clean(-bank[index], index=index)
    noised = noised_at(clean, 1.0, source)
    found = target(noised, clean, source)
    for i in range(2):
        references = bank.clone()
        references[index[i]] = clean.x0[i]
        logits = -(noised.xt[i] - references).square().sum(1) / 2
        torch.testing.assert_close(found.x0[i], logits.softmax(0) @ references)


def gradients(target, parameters, network, source_key, sigma, repeats, batch=16):
    """Gradients of the loss over many draws at fixed weights, ``(repeats, parameters)``."""
    x0, label = bank_problem()
    target.fill(x0, label, indexed=True)
    rows = []
    for step in range(repeats):
        source = generator(source_key, step)
        index = torch.randint(len(x0), (batch,), generator=source)
        clean = Clean(x0[index], label[index], index=index)
        noised = noised_at(clean, sigma, source)
        found = diffusion_loss(
            network,
            noised,
            target(noised, clean, source),
            objective=Objective(EDM(), LogUniform(0.1, 1.0), UnitWeighting("x0"), "x0"),
        )
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(found.loss, parameters)]))
    return torch.stack(rows)


@pytest.mark.parametrize("references", ["batch", 16, "all"])
def test_stf_and_dsm_have_the_same_expected_gradient(references, z_score):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    net = net.to(WIDE)
    common = list(net.parameters()), lambda x, _: net(x)
    # the same draws: only the target differs, so the difference shows any bias
    stf = gradients(STF(references), *common, "paired", 1.0, 250)
    dsm = gradients(DSM(), *common, "paired", 1.0, 250)
    difference = stf - dsm
    assert max(abs(z_score(column)) for column in difference.T) < 4
    assert float(difference.abs().max()) > 1e-3


@pytest.mark.parametrize(("sigma", "low", "high"), [(0.02, 0.8, 1.01), (1.0, 0.0, 0.6)])
def test_stf_lowers_gradient_variance_at_noise_levels_where_references_mix(sigma, low, high):
    """With the exact denoiser plus a bias, the gradient's only noise is the target's."""
    x0, label = bank_problem()
    bias = torch.zeros(1, dtype=WIDE, requires_grad=True)

    def network(_, noised):
        return exact_mean(noised, x0, label, noised.group) + bias

    variances = [
        float(gradients(target, [bias], network, "noise", sigma, 300).var())
        for target in (STF("batch"), STF("all"), DSM())
    ]
    batch, whole, dsm = variances
    assert low * dsm <= batch <= high * dsm
    assert whole < 1e-20 * dsm


@pytest.mark.parametrize("references", ["batch", 20, "all"])
def test_below_the_switch_the_target_is_the_own_sample_and_above_it_is_unchanged(references):
    x0, label = bank_problem()
    clean = Clean(x0[:60], label[:60], index=torch.arange(60))
    sigma = torch.logspace(-2, 1, 60, dtype=WIDE)
    noised = noise_samples(clean, EDM(), sigma, torch.ones_like(sigma), generator("switch"))
    plain, switched = STF(references), STF(references, min_noise_level=0.5)
    for target in (plain, switched):
        target.fill(x0, label, indexed=True)
    assert switched.switch == 0.5

    found, expected = (target(noised, clean, generator(1)) for target in (switched, plain))
    below = sigma < 0.5
    assert torch.equal(found.x0[below], x0[:60][below])
    assert torch.equal(found.ess[below], torch.ones_like(sigma)[below])
    assert torch.equal(found.spread[below], torch.zeros_like(sigma)[below])
    for name in ("x0", "ess", "spread"):
        torch.testing.assert_close(
            getattr(found, name)[~below], getattr(expected, name)[~below], rtol=1e-12, atol=1e-12
        )
    assert (found.ess[~below] > 1).all()


def test_when_all_rows_are_below_the_switch_the_own_samples_are_the_target(source):
    clean = Clean(torch.randn(8, 3, generator=source))
    noised = noised_at(clean, 0.1, source)
    assert torch.equal(STF(min_noise_level=0.2)(noised, clean, source).x0, clean.x0)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("references", ["batch", 300, "all"])
def test_the_automatic_switch_is_where_others_have_a_thousandth_of_the_weight(
    references, with_labels
):
    source = generator("automatic")
    x0 = 3 + torch.randn(300, 8, generator=source, dtype=WIDE)
    label = torch.arange(300) % 2 if with_labels else None
    target = STF(references, min_noise_level="auto")
    target.fill(x0, label, indexed=True)

    def others_weigh(sigma):
        xt = x0 + sigma * torch.randn(20, *x0.shape, generator=source, dtype=WIDE)
        logits = -torch.cdist(xt.flatten(0, 1), x0).square() / (2 * sigma**2)
        if with_labels:
            logits = logits.masked_fill(label.repeat(20)[:, None] != label, -math.inf)
        return float(1 - logits.softmax(1).reshape(20, 300, 300).diagonal(0, 1, 2).mean())

    assert others_weigh(0.7 * target.switch) < 1e-3 < others_weigh(1.4 * target.switch)


def test_filling_twice_gives_the_same_automatic_switch():
    x0, label = bank_problem()
    first, second = (STF(8, min_noise_level="auto") for _ in range(2))
    state = torch.get_rng_state()
    for target in (first, second):
        target.fill(x0, label, indexed=True)
    assert first.switch == second.switch > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_condition_falls_back_to_dsm_and_warns_once(caplog, source):
    clean = Clean(torch.randn(4, 3, generator=source), cond={"text": torch.zeros(4, 2)})
    noised = noised_at(clean, 5.0, source)
    target = STF(references=8)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = target(noised, clean, source)
    assert torch.equal(found.x0, clean.x0)
    assert torch.equal(found.ess, torch.ones(4))
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert "falls back to DSM" in messages[0]


def condition_problem(indexed):
    """A data set whose second label distinguishes two mirrored augmentations."""
    x0, label = bank_problem()
    flipped = torch.arange(120) % 2
    x0 = torch.where(flipped[:, None] == 1, 2 - x0, x0)
    cond = {"flipped": flipped}
    index = torch.arange(120) if indexed else None
    return Clean(x0, label, cond, index, cond_group=flipped)


@pytest.mark.parametrize("classes", ["none", "classes", "some dropped"])
@pytest.mark.parametrize("references", ["batch", 120, "all"])
def test_references_with_another_condition_have_no_weight(references, classes, source):
    """Against the posterior for each condition by itself, by distances."""
    clean = condition_problem(indexed=references != "batch")
    if classes == "none":
        clean = replace(clean, group=None)
    target = STF(references)
    target.fill(clean.x0, clean.group, indexed=True, cond_group=clean.cond_group)
    noised = noised_at(clean, 1.0, source)
    query = torch.full((120,), UNLABELLED) if clean.group is None else clean.group
    if classes == "some dropped":
        query = torch.where(torch.arange(120) % 3 == 0, UNLABELLED, query)
        noised = replace(noised, group=query)

    found = target(noised, clean, source).x0
    for number in (0, 1):
        rows = clean.cond_group == number
        part = replace(noised, xt=noised.xt[rows], sigma=noised.sigma[rows])
        label = torch.zeros(120).long() if clean.group is None else clean.group
        expected = exact_mean(part, clean.x0[rows], label[rows], query[rows])
        torch.testing.assert_close(found[rows], expected)
    pooled = exact_mean(noised, clean.x0, clean.group if clean.group is not None else query, query)
    assert float((found - pooled).abs().max()) > 0.1


@pytest.mark.parametrize("references", ["batch", 16])
def test_given_a_condition_that_others_share_the_target_is_unbiased(references, z_score):
    clean, source = condition_problem(indexed=True), generator("conditions")
    target = STF(references)
    target.fill(clean.x0, clean.group, indexed=True, cond_group=clean.cond_group)
    exact, rows = torch.empty(32, 1, dtype=WIDE), []
    for _ in range(300):
        some = clean.rows(torch.randint(120, (32,), generator=source))
        noised = noised_at(some, 1.0, source)
        query = torch.where(torch.arange(32) % 2 == 0, UNLABELLED, noised.group)
        noised = replace(noised, group=query)
        for number in (0, 1):
            mine, like = some.cond_group == number, clean.cond_group == number
            part = replace(noised, xt=noised.xt[mine], sigma=noised.sigma[mine])
            exact[mine] = exact_mean(part, clean.x0[like], clean.group[like], query[mine])
        error = target(noised, some, source).x0 - exact
        rows.append(mean_by_set(error, noised.xt, 32, query))
    assert largest(z_score, torch.cat(rows)) < 4


def test_a_condition_with_a_number_does_not_fall_back(caplog, source):
    clean = condition_problem(indexed=False)
    with caplog.at_level(logging.WARNING):
        found = STF()(noised_at(clean, 5.0, source), clean, source)
    assert not caplog.records
    assert float(found.ess.min()) > 2


def warnings_of(caplog, target, clean, source):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            target(noised_at(clean, 1.0, source), clean, source)
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("references", [4, "all"])
def test_samples_that_differ_from_their_copies_in_the_bank_warn_once(references, caplog, source):
    bank = 5 + torch.randn(20, 12, generator=source)
    target = STF(references)
    target.fill(bank, None, indexed=True)
    index = torch.tensor([4, 11, 0])
    mirrored = bank[index]
    mirrored[1] = mirrored[1].flip(0)
    messages = warnings_of(caplog, target, Clean(mirrored, index=index), source)
    assert len(messages) == 1
    assert "differ from the bank's copies" in messages[0]
    assert "references='batch'" in messages[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_that_equal_their_copies_up_to_rounding_do_not_warn(dtype, caplog, source):
    bank = 5 + torch.randn(20, 12, generator=source)
    target = STF("all")
    target.fill(bank, None, indexed=True)
    index = torch.tensor([4, 11, 0])
    clean = Clean(bank[index].to(dtype), index=index)
    assert not warnings_of(caplog, target, clean, source)


def test_samples_without_indices_that_no_reference_is_a_copy_of_warn_once(caplog, source):
    bank = 5 + torch.randn(20, 12, generator=source)
    target = STF(4)
    target.fill(bank, None, indexed=False)
    mirrored = bank[:3].clone()
    mirrored[1] = mirrored[1].flip(0)
    (message,) = warnings_of(caplog, target, Clean(mirrored), source)
    assert "differ from the bank's copies" in message


def test_samples_without_indices_that_equal_a_reference_do_not_warn(caplog, source):
    bank = 5 + torch.randn(20, 12, generator=source)
    target = STF(4)
    target.fill(bank, None, indexed=False)
    assert not warnings_of(caplog, target, Clean(bank[torch.tensor([4, 11, 0])]), source)


def test_without_a_bank_no_copies_are_looked_for(caplog, source):
    assert not warnings_of(caplog, STF(), Clean(torch.randn(3, 3, generator=source)), source)


def test_the_target_is_computed_in_float32_under_autocast(source):
    clean = Clean(torch.randn(16, 12, generator=source))
    noised = noised_at(clean, 3.0, source)
    plain = STF()(noised, clean, source)
    with torch.autocast("cpu", torch.bfloat16):
        cast = STF()(noised, clean, source)
    assert cast.x0.dtype == torch.float32
    assert torch.equal(cast.x0, plain.x0)


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_the_chunk_size_does_not_change_the_target(chunk_size, source):
    clean = Clean(torch.randn(16, 12, generator=source, dtype=WIDE))
    noised = noised_at(clean, 3.0, source)
    expected = STF()(noised, clean, source).x0
    torch.testing.assert_close(STF(chunk_size=chunk_size)(noised, clean, source).x0, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": 0}, "`references` must be 'batch', 'all' or a number .* got 0"),
        ({"references": "bank"}, "`references` must .* got 'bank'"),
        ({"references": 2.5}, "`references` must .* got 2.5"),
        ({"min_noise_level": -1.0}, "`min_noise_level` must .* got -1.0"),
        ({"min_noise_level": "always"}, "`min_noise_level` must .* got 'always'"),
        ({"min_noise_level": math.nan}, "`min_noise_level` must .* got nan"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        STF(**options)


def test_all_references_without_indices_raise_with_the_reason():
    with pytest.raises(ValueError, match=r"`references='all'` needs sample indices.*twice"):
        STF("all").fill(torch.randn(5, 2), None, indexed=False)


def test_more_references_than_samples_raise():
    with pytest.raises(ValueError, match=r"`references` must be at most 5, .* got 6"):
        STF(6).fill(torch.randn(5, 2), None, indexed=True)


def test_a_missing_bank_raises_and_says_how_to_fill_it(source):
    clean = Clean(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"STF\(references=4\) has no bank, which `fit` fills"):
        STF(4)(noised_at(clean, 1.0, source), clean, source)


def test_a_batch_without_indices_raises(source):
    target = STF("all")
    target.fill(torch.zeros(5, 3), None, indexed=True)
    clean = Clean(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"STF\(references='all'\) got a batch without sample ind"):
        target(noised_at(clean, 1.0, source), clean, source)
