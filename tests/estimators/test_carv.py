import math
from contextlib import nullcontext
from dataclasses import replace

import numpy
import pytest
import torch
from support.covering_arrays import covering_array
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_vr.core.rng import generator
from lightning_vr.core.types import UNLABELLED, Clean, LossEstimate, StepPart, TargetEstimate
from lightning_vr.estimators.carv import CARV, stratify
from lightning_vr.estimators.draws import IID
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.proposals import LearnedProposal, TableProposal, WeightProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import EDM, VE
from lightning_vr.process.timesteps import LogUniform, Truncated, Uniform
from lightning_vr.process.weightings import EDMWeighting, UnitWeighting, Weighting
from lightning_vr.training.module import DiffusionModule

WIDE = torch.float64
PLAIN = Objective(VE(), Uniform(0, 1), UnitWeighting("x0"), "x0")
"""Times are quantiles, weights are one."""


def points(count, dimension=1):
    return Clean(torch.linspace(-1, 1, count * dimension).reshape(count, dimension))


def parts_of(draws, objective, samples, parts, step=0):
    """All parts of one optimizer step: ranks and accumulated batches."""
    return [
        draws(
            points(samples),
            objective,
            generator("jitter", step, number),
            StepPart(number, parts, generator("strata", step)),
        )
        for number in range(parts)
    ]


@pytest.mark.parametrize("scope", ["none", "sample"])
def test_one_draw_of_each_sample_without_more_is_iid(scope):
    clean, objective = points(16, 3), Objective(EDM(), LogUniform(0.1, 10), UnitWeighting())
    found = CARV(1, scope=scope)(clean, objective, generator(3))
    expected = IID()(clean, objective, generator(3))
    for name in ("xt", "x0", "noise", "t", "alpha", "sigma", "weight"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.loss_weight is None


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("scope", ["none", "sample", "global", "nested", "auto"])
def test_draws_of_one_sample_stand_next_to_each_other(scope, antithetic, source):
    x0 = torch.randn(3, 2, generator=source)
    group, index = torch.tensor([2, 0, 1]), torch.tensor([7, 5, 6])
    clean = Clean(x0, group, {"text": x0 + 1}, index)
    draws = CARV(4, scope=scope, antithetic=antithetic)
    noised = draws(clean, PLAIN, source)
    rows = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    assert torch.equal(noised.x0, x0[rows])
    assert torch.equal(noised.group, group[rows])
    assert torch.equal(noised.cond["text"], x0[rows] + 1)
    assert torch.equal(noised.index, index[rows])
    assert draws.draws_per_sample == 4
    torch.testing.assert_close(noised.xt, PLAIN.schedule.perturb(noised.x0, noised.noise, noised.t))
    times = noised.t.unique()
    assert len(times) == (6 if antithetic else 12)


def quantiles(t, proposal):
    """The quantiles in q of times: q is the table [3, 1] or uniform."""
    t = t.double()
    return t if proposal is None else torch.where(t < 0.5, 1.5 * t, 0.75 + 0.5 * (t - 0.5))


def hits(u, strata):
    """How often each of equally likely strata is hit, ``u (n, draws)`` for each of n."""
    return torch.nn.functional.one_hot((u * strata).long(), strata).sum(1)


proposals = pytest.mark.parametrize(
    "proposal", [None, TableProposal([3.0, 1.0])], ids=["base", "table"]
)


@proposals
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("parts", [1, 6])
@pytest.mark.parametrize("scope", ["sample", "global", "nested", "auto"])
@pytest.mark.parametrize("resamples", [2, 4, 6])
def test_every_stratum_is_hit_exactly_once(resamples, scope, parts, antithetic, proposal):
    draws = CARV(resamples, proposal, scope, antithetic)
    for step in range(5):
        found = parts_of(draws, PLAIN, 5, parts, step)
        u = torch.cat([quantiles(noised.t, proposal) for noised in found])
        copies = 2 if antithetic else 1
        u = u[::copies].reshape(5 * parts, -1)
        if scope != "global":
            assert (hits(u, resamples // copies) == 1).all()
        if scope != "sample":
            assert (hits(u.reshape(1, -1), u.numel()) == 1).all()


@pytest.mark.parametrize("parts", [1, 4])
def test_one_draw_of_each_sample_hits_the_strata_of_the_step_once(parts):
    for scope in ("auto", "global", "nested"):
        u = torch.cat([noised.t for noised in parts_of(CARV(1, scope=scope), PLAIN, 7, parts)])
        assert (hits(u.double()[None], 7 * parts) == 1).all()


class SortsTiesInAnotherOrder(TorchDispatchMode):
    """Another machine: its unstable sort is right, and orders ties in another way."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        options = kwargs or {}
        if func.overloadpacket is not torch.ops.aten.sort or options.get("stable"):
            return func(*args, **options)
        x, axis = args[0], options.get("dim", args[1] if len(args) > 1 else -1)
        values, order = x.flip(axis).sort(dim=axis, stable=True)
        return values, x.shape[axis] - 1 - order


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("scope", ["global", "nested"])
def test_ranks_order_strata_alike_where_their_random_numbers_tie(scope, count, monkeypatch):
    """Ties are rare in float32 numbers and matter where two ranks meet: here a third are equal."""
    uniform = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **options: uniform(*args, **options) * 3 // 1)
    samples, found = 50, []
    for rank in range(2):
        u = torch.full((samples, count), 0.5, dtype=WIDE)
        part = StepPart(rank, 2, generator("strata"))
        with SortsTiesInAnotherOrder() if rank else nullcontext():
            found.append(stratify(u, scope, part, generator("unused")))
    assert (hits(torch.cat(found).reshape(1, -1), 2 * samples * count) == 1).all()


@pytest.mark.parametrize("scope", ["global", "nested"])
def test_which_stratum_is_whose_differs_from_step_to_step(scope, z_score):
    orders = torch.stack(
        [
            torch.cat([n.t for n in parts_of(CARV(1, scope=scope), PLAIN, 4, 2, step)])
            for step in range(400)
        ]
    )
    strata = (orders.double() * 8).long()
    assert len({tuple(row.tolist()) for row in strata}) > 390
    assert max(abs(z_score(column, 3.5)) for column in strata.double().T) < 4
    assert abs(z_score(strata[:, 0].eq(strata[:, 5].roll(1)).double(), 1 / 8)) < 4


@pytest.mark.parametrize("scope", ["sample", "global", "nested"])
def test_within_its_stratum_each_time_is_uniform(scope, z_score):
    t = torch.cat([CARV(4, scope=scope)(points(8), PLAIN, generator(i)).t for i in range(200)])
    strata = 4 if scope == "sample" else 32
    jitter = (t.double() * strata).frac()
    assert abs(z_score(jitter, 0.5)) < 4
    assert abs(z_score(jitter**2, 1 / 3)) < 4
    assert abs(z_score((jitter[::2] - 0.5) * (jitter[1::2] - 0.5))) < 4


def test_antithetic_pairs_have_one_time_and_opposite_noise():
    noised = CARV(6, antithetic=True)(points(20, 3), PLAIN, generator(0))
    assert torch.equal(noised.t[::2], noised.t[1::2])
    assert torch.equal(noised.noise[::2], -noised.noise[1::2])
    assert len(noised.noise[::2].unique()) == 180
    x0, sigma = noised.x0, noised.sigma[:, None]
    torch.testing.assert_close(noised.xt, x0 + sigma * noised.noise)


def test_only_between_the_noise_levels_is_the_noise_opposite():
    draws = CARV(4, antithetic=(0.1, 2.0))
    noised = draws(points(200, 3), PLAIN, generator(0))
    first, second = noised.noise[::2], noised.noise[1::2]
    level = noised.noise_level[::2]
    inside = (level >= 0.1) & (level <= 2.0)
    assert 100 < int(inside.sum()) < 300
    assert torch.equal(noised.t[::2], noised.t[1::2])
    assert torch.equal(first[inside], -second[inside])
    assert not torch.isin(second[~inside].abs(), first.abs()).any()
    torch.testing.assert_close(noised.xt, noised.x0 + noised.sigma[:, None] * noised.noise)


def test_pairs_that_are_never_opposite_are_independent_noise(z_score):
    noised = CARV(2, antithetic=(1e5, 1e6))(points(5000), PLAIN, generator(0))
    pairs = noised.noise.reshape(-1, 2)
    assert abs(z_score(pairs[:, 0] * pairs[:, 1])) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": 0}, "`resamples` must be 'auto' or a number of 1 or more, got 0"),
        ({"resamples": 2.0}, "`resamples` must .* got 2.0"),
        ({"resamples": True}, "`resamples` must .* got True"),
        ({"resamples": "many"}, "`resamples` must .* got 'many'"),
        ({"scope": "batch"}, "`scope` must be 'auto', 'none', 'sample', .* got 'batch'"),
        ({"resamples": 3, "antithetic": True}, "must be even .* got 3: use 4, or"),
        ({"resamples": 1, "antithetic": (0.1, 1.0)}, "must be even .* got 1: use 2"),
        ({"antithetic": (1.0, 1.0)}, "`antithetic` must be True, False or two noise lev"),
        ({"antithetic": (-1.0, 1.0)}, r"0 <= low < high, got \(-1.0, 1.0\)"),
        ({"antithetic": (0.0, math.nan)}, "`antithetic` must be"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"max_resamples": 0}, "`max_resamples` must be at least 1, got 0"),
        ({"max_resamples": 1, "antithetic": True}, "`max_resamples` must be at least 2"),
        ({"pilot_every_n_steps": 0}, "`pilot_every_n_steps` must be at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        CARV(**options)


def test_a_proposal_that_misses_part_of_the_loss_raises_when_the_module_is_built():
    with pytest.raises(ValueError, match="a TableProposal that is zero at times"):
        DiffusionModule(ResidualMLP(2, width=4, depth=1), draws=CARV(1, TableProposal([1.0, 0.0])))


TIMES = LogUniform(0.1, 10.0)
UNEVEN = Objective(EDM(), TIMES, EDMWeighting(), "x0")
PARAMETERS = 0.7, -0.3, 0.2
VALUES = torch.tensor([-1.0, 0.4, 1.5], dtype=WIDE)


def statistics(x0, noise, t, weight):
    """Loss and gradient of ``(tanh(a x_t + b log t + c) - x0)²`` for each draw, ``(n, 4)``."""
    a, b, c = PARAMETERS
    x0, noise, t, weight = (x.double() for x in (x0, noise, t, weight))
    xt = x0 + t * noise
    output = torch.tanh(a * xt + b * t.log() + c)
    slope = 2 * weight * (output - x0) * (1 - output**2)
    features = torch.stack([xt, t.log(), torch.ones_like(t)], dim=-1)
    loss = weight * (output - x0) ** 2
    return torch.cat([loss[..., None], slope[..., None] * features], dim=-1)


def exact_statistics():
    """Their means over samples, times and noise, by quadrature."""
    nodes, weights = (torch.from_numpy(x) for x in numpy.polynomial.legendre.leggauss(80))
    normal, mass = (torch.from_numpy(x) for x in numpy.polynomial.hermite_e.hermegauss(120))
    t = TIMES(0.5 * (nodes + 1))[None, :, None]
    x0, noise = VALUES[:, None, None], normal[None, None]
    x0, noise, t = torch.broadcast_tensors(x0, noise, t)
    every = statistics(x0, noise, t, 4 + t**-2)
    mass = mass / math.sqrt(2 * math.pi)
    return torch.einsum("stnk,t,n->k", every, 0.5 * weights, mass) / len(VALUES)


def learned():
    proposal = LearnedProposal(bins=6)
    v = (torch.arange(6, dtype=WIDE).repeat(8) + 0.5) / 6
    proposal.observe(v, torch.ones_like(v), torch.exp(-4 * v))
    proposal.advance()
    return proposal


Q = {
    "base": None,
    "weight": WeightProposal(),
    "table": TableProposal([5.0, 0.5, 1.0]),
    "learned": learned(),
}


def statistics_of_steps(draws, steps, samples):
    """Statistics of independent steps: ``(steps, 4)``, the mean over a step's draws."""
    rows = []
    for step in range(steps):
        source = generator("steps", step)
        x0 = VALUES[torch.randint(3, (samples, 1), generator=source)].float()
        noised = draws(Clean(x0), UNEVEN, source)
        weight = noised.loss_weight
        if weight is None:
            weight = noised.weight * UNEVEN.weight(noised.t)
        found = statistics(noised.x0[:, 0], noised.noise[:, 0], noised.t, weight)
        groups = samples if draws.scope in ("none", "sample") else 1
        rows.append(found.reshape(groups, -1, 4).mean(1))
    return torch.cat(rows)


def size_of(scope):
    return (1, 6000) if scope in ("none", "sample") else (250, 6)


DRAWS = {
    "scope": ["none", "sample", "global", "nested"],
    "proposal": list(Q),
    "pairing": [(1, False), *((k, x) for k in (2, 4, 8) for x in (False, True, (0.3, 3.0)))],
}


def some_draws(strength):
    """Draws in which each combination of so many of their settings occurs."""
    rows = covering_array(DRAWS, strength, lambda _: True)
    return pytest.mark.parametrize(list(DRAWS), [tuple(row.values()) for row in rows], ids=str)


@some_draws(2)
def test_loss_and_gradient_are_unbiased(scope, proposal, pairing, z_score):
    check_unbiased(scope, proposal, *pairing, z_score)


@pytest.mark.slow
@some_draws(3)
def test_loss_and_gradient_of_all_draws_are_unbiased(scope, proposal, pairing, z_score):
    check_unbiased(scope, proposal, *pairing, z_score)


def check_unbiased(scope, proposal, resamples, antithetic, z_score):
    draws = CARV(resamples, Q[proposal], scope, antithetic)
    found = statistics_of_steps(draws, *size_of(scope))
    exact = exact_statistics()
    scores = [z_score(found[:, i], float(exact[i])) for i in range(4)]
    assert max(map(abs, scores)) < 4.5


@pytest.mark.parametrize("proposal", ["weight", "table", "learned"])
@pytest.mark.parametrize("scope", ["sample", "global"])
def test_missing_weights_are_a_bias_that_the_same_test_finds(scope, proposal, z_score):
    class Unweighted(CARV):
        def times(self, *args):
            times = super().times(*args)
            return times._replace(weight=torch.ones_like(times.t), loss_weight=None)

    found = statistics_of_steps(Unweighted(4, Q[proposal], scope), *size_of(scope))
    exact = exact_statistics()
    assert max(abs(z_score(found[:, i], float(exact[i]))) for i in range(4)) > 6


@pytest.mark.parametrize("scope", ["none", "sample", "global", "nested"])
@pytest.mark.parametrize("proposal", Q)
def test_the_loss_is_that_of_the_statistics(scope, proposal, source):
    """The closed form of the z-tests is what ``diffusion_loss`` and autograd give."""
    draws = CARV(4, Q[proposal], scope)
    noised = draws(Clean(torch.randn(5, 1, generator=source)), UNEVEN, source)
    a, b, c = parameters = torch.tensor(PARAMETERS, requires_grad=True)
    target = TargetEstimate(noised.x0, torch.ones(20), torch.zeros(20))
    loss = diffusion_loss(
        lambda x, noised: torch.tanh(a * x + b * noised.t.log()[:, None] + c),
        noised,
        target,
        objective=UNEVEN,
    ).loss
    (gradient,) = torch.autograd.grad(loss, parameters)
    weight = noised.weight * UNEVEN.weight(noised.t)
    if noised.loss_weight is not None:
        torch.testing.assert_close(noised.loss_weight, weight)
    found = statistics(noised.x0[:, 0], noised.noise[:, 0], noised.t, weight).mean(0).float()
    torch.testing.assert_close(torch.cat([loss.detach()[None], gradient]), found)


@pytest.mark.parametrize("scope", ["none", "sample", "nested"])
def test_the_weight_proposal_makes_all_products_alike(scope):
    noised = CARV(4, WeightProposal(), scope)(points(50), UNEVEN, generator(0))
    mean = 4 + (0.1**-2 - 10**-2) / (2 * math.log(100))
    torch.testing.assert_close(noised.loss_weight, torch.full((200,), mean), rtol=1e-4, atol=0)


A, B, C = 0.4, 3.0, 0.7
"""A response that is linear in sample, time and noise: V_B = A², V_t = B²/12, V_noise = C²."""


def responses(draws, steps, samples, key=0):
    """Means over steps' draws of ``A x0 + B t + C noise``, less the mean."""
    means = []
    for step in range(steps):
        source = generator("responses", key, step)
        noised = draws(Clean(torch.randn(samples, 1, generator=source)), PLAIN, source)
        t = noised.t[:, None]
        g = A * noised.x0 + B * (t - 0.5) + C * noised.noise
        groups = samples if draws.scope in ("none", "sample") else 1
        means.append(g.double().reshape(groups, -1).mean(1))
    return torch.cat(means)


@pytest.mark.parametrize(
    ("resamples", "antithetic"),
    [(1, False), (2, False), (4, False), (8, False), (2, True), (4, True), (8, True)],
)
@pytest.mark.parametrize("scope", ["none", "sample", "global", "nested"])
def test_the_variance_of_a_linear_response_is_its_closed_form(
    scope, resamples, antithetic, z_score
):
    samples, pairs = 3, resamples // (2 if antithetic else 1)
    noise = 0.0 if antithetic else C**2 / resamples
    draws = CARV(resamples, None, scope, antithetic)
    if scope in ("none", "sample"):
        found = responses(draws, 1, 20_000)
        expected = A**2 + noise + B**2 / 12 / (pairs if scope == "none" else pairs**3)
    else:
        found = responses(draws, 1000, samples)
        time = B**2 / 12 / (samples * pairs) ** 3
        expected = (A**2 + noise) / samples + time
    assert abs(z_score(found**2, expected)) < 4.5


@pytest.mark.parametrize("scope", ["global", "nested"])
def test_over_all_parts_of_a_step_the_variance_is_that_of_one_large_batch(scope, z_score):
    means = []
    for step in range(600):
        found = parts_of(CARV(2, scope=scope), PLAIN, 2, 3, step)
        means.append(torch.cat([noised.t.double() for noised in found]).mean() - 0.5)
    assert abs(z_score(torch.stack(means) ** 2, 1 / 12 / 12**3)) < 4.5


def test_draws_of_one_part_are_uniform_without_the_other_parts(z_score):
    """A step that is cut short, after one of three batches, is unbiased too."""
    means = [parts_of(CARV(2), PLAIN, 2, 3, step)[0].t.double() for step in range(600)]
    t = torch.stack(means)
    assert abs(z_score(t.mean(1), 0.5)) < 4
    assert abs(z_score((t**2).mean(1), 1 / 3)) < 4


class Square(Weighting):
    def forward(self, schedule, t):
        return 3 * t**2


@pytest.mark.parametrize(
    ("proposal", "of_t", "of_noise"),
    [
        (None, 9 / 5 - 1, 9 / 5),
        (WeightProposal(), 0.0, 1.0),
        # of 3 t² on bins of heights 1/2 and 3/2: integrals of 9 t⁴ over h
        (TableProposal([1.0, 3.0]), 9 / 5 * (2 / 32 + 31 / 48) - 1, 9 / 5 * (2 / 32 + 31 / 48)),
    ],
    ids=["base", "weight", "table"],
)
def test_importance_sampling_has_the_variance_of_the_closed_form(proposal, of_t, of_noise, z_score):
    """The response ``w(t) (1 + C noise)`` with w = 3 t², whose mean is 1."""
    objective = Objective(VE(), Uniform(0, 1), Square(), "x0")
    noised = CARV(1, proposal, "none")(points(60_000), objective, generator("importance"))
    weight = noised.weight * objective.weight(noised.t)
    if noised.loss_weight is not None:
        weight = noised.loss_weight
    found = weight.double() * (1 + C * noised.noise[:, 0].double())
    assert abs(z_score(found, 1)) < 4
    assert abs(z_score((found - 1) ** 2, of_t + C**2 * of_noise)) < 4.5


def module(draws, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(2, width=8, depth=1, num_class_embeds=3)
        torch.nn.init.normal_(network.project_out.weight)
    return DiffusionModule(network, num_classes=2, draws=draws, **options)


def labelled(count, source):
    x0, group = torch.randn(count, 2, generator=source), torch.arange(count) % 2
    return Clean(x0, group, index=torch.arange(count))


def test_labels_are_dropped_anew_for_every_draw_of_a_sample(source, z_score):
    clean = labelled(2000, source)
    model = module(CARV(4), label_dropout=0.3)
    noised = model.loss(clean, source).noised
    dropped = noised.group == UNLABELLED
    assert torch.equal(noised.group[~dropped], clean.group.repeat_interleave(4)[~dropped])
    dropped = dropped.double().reshape(-1, 4)
    assert abs(z_score(dropped.flatten(), 0.3)) < 4
    assert abs(z_score((dropped[:, 0] - 0.3) * (dropped[:, 3] - 0.3))) < 4


@pytest.mark.parametrize("label_dropout", [0.0, 0.4])
@pytest.mark.parametrize("references", ["batch", "all"])
def test_each_of_several_draws_has_the_target_of_a_draw_on_its_own(
    references, label_dropout, source
):
    bank = labelled(40, source)
    bank = replace(bank, x0=bank.x0.double())
    clean = bank.rows(torch.arange(0, 40, 3))
    target = STF(references)
    target.fill(bank.x0, bank.group, indexed=True)
    model = module(CARV(4), target=target, label_dropout=label_dropout)
    estimate = model.loss(clean, source)
    noised, found = estimate.noised, estimate.target.x0

    pool = clean if references == "batch" else bank
    scale = 2 * noised.sigma.double()[:, None] ** 2
    logits = -torch.cdist(noised.xt, pool.x0).square() / scale
    foreign = (noised.group[:, None] != pool.group) & (noised.group[:, None] >= 0)
    expected = logits.masked_fill(foreign, -math.inf).softmax(1) @ pool.x0
    assert found.shape == (4 * len(clean.x0), 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moment", ["gradient", "loss"])
def test_what_is_learned_is_the_second_moment_of_what_autograd_gives(moment, source):
    """Of the gradient with respect to the network's output, without importance weights."""
    proposal = LearnedProposal(moment, bins=4)
    draws = CARV(8, TableProposal([1.0, 3.0]), scope="sample")
    noised = draws(Clean(torch.randn(30, 2, generator=source)), UNEVEN, source)
    target = TargetEstimate(noised.x0, torch.ones(240), torch.zeros(240))
    outputs = []

    def network(x, noised):
        outputs.append((x / 2).requires_grad_())
        return outputs[0]

    def estimate_of(noised):
        return diffusion_loss(network, noised, target, objective=UNEVEN)

    draws.proposal = proposal
    draws.observe(estimate_of(noised), UNEVEN)
    draws.advance()

    outputs.clear()
    plain = estimate_of(replace(noised, weight=torch.ones(240), loss_weight=None)).per_draw
    if moment == "gradient":
        (gradient,) = torch.autograd.grad(plain.sum(), outputs[0])
        # d/4 of it: the loss is a mean over d
        moments = gradient.square().sum(1) * 2 / 4
    else:
        moments = plain.detach() ** 2
    bins = (TIMES.cdf(noised.t.double()) * 4).long()
    sums = torch.zeros(4, dtype=WIDE).index_add(0, bins, moments.double())
    torch.testing.assert_close(proposal.table[0], sums, rtol=1e-5, atol=0)
    assert torch.equal(proposal.table[1], torch.bincount(bins, minlength=4).double())


def test_truncated_times_are_observed_in_the_bins_that_they_are_drawn_from():
    timesteps = Truncated(Uniform(0, 1), 0, 0.5)
    objective = replace(PLAIN, timesteps=timesteps)
    draws = CARV(64, LearnedProposal(bins=2, floor=0.2), "sample")
    noised = draws(points(1), objective, generator(0))
    loss = torch.where(noised.t < 0.25, 1.0, 9.0)
    target = TargetEstimate(noised.x0, noised.t, noised.t)
    draws.observe(LossEstimate(loss.mean(), loss, noised, target), objective)
    draws.advance()
    h = draws.proposal(objective, torch.device("cpu"))
    torch.testing.assert_close(
        h(torch.tensor([0.25, 0.75], dtype=WIDE)), torch.tensor([0.6, 1.4], dtype=WIDE)
    )


@pytest.mark.parametrize("name", ["resamples", "max_resamples"])
def test_more_resamples_than_float32_has_strata_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at most 16777216"):
        CARV(**{name: 2**24 + 1})
    CARV(**{name: 2**24})
