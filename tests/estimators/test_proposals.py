import math

import pytest
import torch

from lightning_vr.estimators.proposals import (
    LearnedProposal,
    TableProposal,
    WeightProposal,
)
from lightning_vr.process.objective import Objective
from lightning_vr.process.quantile_density import QuantileDensity
from lightning_vr.process.schedules import EDM, VE, VP, RectifiedFlow
from lightning_vr.process.timesteps import LogitNormal, LogNormal, Truncated, Uniform, UniformSteps
from lightning_vr.process.weightings import (
    EDMWeighting,
    LogNormalWeighting,
    MinSNRWeighting,
    UnitWeighting,
    Weighting,
)

WIDE = torch.float64
CPU = torch.device("cpu")


def grid(count):
    return (torch.arange(count, dtype=WIDE) + 0.5) / count


class Weights(Weighting):
    """A weight that is any function of the time."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, schedule, t):
        return self.function(t).to(t.dtype)


def with_weight(function, timesteps=None):
    """The objective whose weight on the network's error is a function of t alone."""
    schedule = VE(1.0, 1.001)
    return Objective(schedule, timesteps or Uniform(0.1, 0.9), Weights(function), "x0")


def table_weight(table):
    return with_weight(lambda t: table[t.long()], UniformSteps(len(table)))


def spiky(steps=1000):
    """One step with nine tenths of the mass, many with next to nothing, some with none."""
    table = torch.rand(steps, generator=torch.Generator().manual_seed(0), dtype=WIDE)
    table[100:400], table[700:800] = 1e-9, 0
    table[437] = 0
    table[437] = 9 * table.sum()
    return table


def integral(h, ends):
    """The integral of h from 0 to each end, by Gauss-Legendre in each cell: exact if linear."""
    low = h.edges[:-1].expand(len(ends), -1)
    high = torch.minimum(h.edges[1:], torch.maximum(h.edges[:-1], ends[:, None]))
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    nodes = [middle + sign * half / math.sqrt(3) for sign in (-1, 1)]
    return (half * sum(h(node.flatten()).reshape(node.shape) for node in nodes)).sum(1)


EDGES = torch.tensor([0.0, 0.05, 0.3, 0.31, 0.6, 0.9, 1.0], dtype=WIDE)
LINEAR = QuantileDensity(
    EDGES,
    torch.tensor([0.0, 2.0, 1.0, 0.0, 5.0, 1.0], dtype=WIDE),
    torch.tensor([3.0, 2.0, 9.0, 0.0, 1e-6, 0.0], dtype=WIDE),
)
STEPPED = QuantileDensity(EDGES, torch.tensor([0.0, 1.0, 0.0, 30.0, 1e-9, 0.0], dtype=WIDE))
shapes = pytest.mark.parametrize("h", [LINEAR, STEPPED], ids=["linear", "stepped"])


@shapes
def test_the_icdf_inverts_the_integral_of_the_density(h):
    u = grid(2000)
    torch.testing.assert_close(integral(h, h.icdf(u)), u, rtol=1e-9, atol=1e-9)
    assert float(integral(h, torch.ones(1, dtype=WIDE))) == pytest.approx(1, abs=1e-12)


@shapes
def test_cells_without_mass_are_never_drawn(h):
    cumulative = integral(h, EDGES).clamp(2.0**-54, 1 - 2.0**-53)
    v = h.icdf(torch.cat([grid(10_000), cumulative]))
    assert ((v > 0) & (v < 1)).all()
    assert (h(v) > 0).all()


@shapes
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.02, 0.301), (0.25, 1.0), (0.35, 0.62)])
def test_a_part_of_a_density_is_the_density_there_over_its_mass(h, low, high):
    part, w = h.between(low, high), grid(997)
    start, end = integral(h, torch.tensor([low, high], dtype=WIDE))
    expected = h(low + (high - low) * w) * (high - low) / (end - start)
    torch.testing.assert_close(part(w), expected, rtol=1e-9, atol=1e-12)
    assert float(integral(part, torch.ones(1, dtype=WIDE))) == pytest.approx(1, abs=1e-12)


SMOOTH = {
    "edm-x0": Objective(EDM(), LogNormal(), UnitWeighting("x0"), "edm"),
    "edm-epsilon-of-x0": Objective(EDM(), LogNormal(), UnitWeighting("epsilon"), "x0"),
    "flow-x0-of-v": Objective(RectifiedFlow(), LogitNormal(), UnitWeighting("x0"), "v"),
}
ROUGH = {
    "ve-bell": Objective(VE(), Uniform(0, 1), LogNormalWeighting(), "edm"),
    "vp-edm-of-epsilon": Objective(VP(), Uniform(1e-5, 1), EDMWeighting(), "epsilon"),
    "edm-clipped": Objective(EDM(), LogNormal(), MinSNRWeighting(), "x0"),
}


def product(h, objective, u):
    v = h.icdf(u)
    return objective.weight(objective.timesteps(v)) / h(v)


@pytest.mark.parametrize("name", [*SMOOTH, *ROUGH])
def test_the_product_of_weights_is_the_same_for_all_draws(name):
    objective, tolerance = (SMOOTH | ROUGH)[name], 1e-4 if name in SMOOTH else 1e-2
    found = product(WeightProposal()(objective, CPU), objective, grid(20_000))
    torch.testing.assert_close(found, found.mean().expand_as(found), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.3)])
def test_the_product_of_weights_is_the_mean_weight(mean, std):
    objective = Objective(EDM(), LogNormal(mean, std), UnitWeighting("epsilon"), "x0")
    found = product(WeightProposal()(objective, CPU), objective, grid(100))
    expected = math.exp(-2 * mean + 2 * std**2)  # of s ** -2 for a log-normal s
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("table", [torch.arange(1.0, 8.0, dtype=WIDE), spiky()], ids=len)
def test_for_discrete_steps_the_product_of_weights_is_the_mean_weight_exactly(table):
    objective = table_weight(table)
    found = product(WeightProposal()(objective, CPU), objective, grid(5000))
    torch.testing.assert_close(found, table.mean().expand_as(found), rtol=1e-12, atol=0)


def test_a_weight_that_does_not_depend_on_the_time_leaves_the_base_density(schedule, kind):
    objective = Objective(schedule, schedule.default_timesteps(), UnitWeighting(kind), kind)
    h, u = WeightProposal()(objective, CPU), grid(1000)
    torch.testing.assert_close(h.icdf(u), u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(h(u), torch.ones_like(u), rtol=1e-9, atol=1e-9)


def learned(bins=5):
    proposal = LearnedProposal(bins=bins)
    v = grid(bins).repeat(8)
    proposal.observe(v, torch.ones_like(v), (3 * v).exp())
    proposal.advance()
    return proposal


PROPOSALS = {
    "weight": WeightProposal(),
    "table": TableProposal([0.1, 5.0, 0.3, 1.0]),
    "learned": learned(),
}


def mean(function):
    """The mean over (0, 1), evenly in the logit: what is steep at the ends is resolved."""
    x = torch.linspace(-35, 35, 200_001, dtype=WIDE)
    u = torch.sigmoid(x)
    return float((function(u) * u * torch.sigmoid(-x)).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.0, 0.125), (0.3, 0.55), (0.875, 1.0)], ids=str)
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("name", [*SMOOTH, *ROUGH])
def test_weighted_draws_have_the_mean_of_the_loss(name, proposal, part):
    objective = (SMOOTH | ROUGH)[name].between(*part)
    h = PROPOSALS[proposal](objective, CPU)

    def loss(v):
        t = objective.timesteps(v)
        return objective.weight(t) * (1 + torch.sin(4 * objective.timesteps.cdf(t)))

    def weighted(u):
        v = h.icdf(u)
        return loss(v) / h(v)

    assert mean(weighted) == pytest.approx(mean(loss), rel=1e-4)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_without_the_weights_the_mean_differs(proposal):
    h = PROPOSALS[proposal](SMOOTH["edm-x0"], CPU)
    assert abs(mean(h.icdf) - 0.5) > 0.02


@pytest.mark.parametrize("kind", ["table", "weight"])
def test_each_step_is_drawn_as_often_as_its_probability_says(kind):
    table, count = spiky(), 1_000_000
    objective = table_weight(table)
    proposal = TableProposal(table.tolist()) if kind == "table" else WeightProposal()
    h = proposal(objective, CPU)
    v = h.icdf(grid(count))
    steps, q = objective.timesteps(v).long(), table / table.sum()

    counts = torch.bincount(steps, minlength=1000)
    assert ((counts - count * q).abs() <= 1).all()
    torch.testing.assert_close(1 / h(v), 1e-3 / q[steps], rtol=1e-11, atol=0)


def test_at_the_edge_of_two_steps_the_weight_is_that_of_the_one_drawn():
    table = spiky()
    q, objective = table / table.sum(), table_weight(table)
    h = TableProposal(table.tolist())(objective, CPU)
    edges = q.cumsum(0)[:-1].clamp(2.0**-54, 1 - 2.0**-53)
    u = torch.cat(
        [edges, edges.nextafter(edges.new_zeros(())), edges.nextafter(edges.new_ones(()))]
    )
    v = h.icdf(u)
    torch.testing.assert_close(1 / h(v), 1e-3 / q[objective.timesteps(v).long()])


def test_a_table_need_not_have_as_many_bins_as_there_are_steps(source):
    objective = table_weight(torch.arange(1.0, 8.0, dtype=WIDE))
    h = TableProposal([3.0, 1.0])(objective, CPU)
    v = h.icdf(grid(70_000))
    steps = objective.timesteps(v).long()
    mass = torch.zeros(7, dtype=WIDE).index_add(0, steps, 1 / h(v)) / 70_000
    torch.testing.assert_close(mass, torch.full_like(mass, 1 / 7), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("probabilities", "weight", "times"),
    [
        ([1.0, 0.0], lambda t: torch.ones_like(t), "0.5 to 0.9"),
        ([0.0, 1.0, 1.0, 1.0], lambda t: torch.ones_like(t), "0.1 to 0.3"),
        ([1.0, 0.0], lambda t: (t > 0.6) & (t < 0.65), "0.6 to 0.65"),
    ],
)
def test_a_table_that_misses_part_of_the_loss_raises(probabilities, weight, times):
    with pytest.raises(
        ValueError, match=r"TableProposal that is zero at times from (\S+) to (\S+):"
    ) as e:
        TableProposal(probabilities).check(with_weight(weight))
    text = str(e.value)
    found = text.split("times from ")[1].split(":")[0].split(" to ")
    assert [float(x) for x in found] == pytest.approx(
        [float(x) for x in times.split(" to ")], abs=2e-3
    )


def test_a_table_that_misses_single_steps_of_the_loss_raises():
    table = torch.zeros(1000, dtype=WIDE)
    table[[3, 777]] = 1.0
    with pytest.raises(
        ValueError, match="zero at times from 777 to 777: mix in some of the base density"
    ):
        TableProposal([1.0, 0.0]).check(table_weight(table))


def test_a_table_may_be_zero_where_the_weight_is():
    objective = with_weight(lambda t: t < 0.5)
    TableProposal([1.0, 0.0]).check(objective)
    WeightProposal().check(with_weight(lambda t: (0.5 - t).clamp(min=0)))
    LearnedProposal().check(objective)


@pytest.mark.parametrize(
    "weight",
    [
        lambda t: torch.full_like(t, math.inf),
        lambda t: torch.full_like(t, math.nan),
        lambda t: t - 0.5,
        lambda t: torch.zeros_like(t),
    ],
    ids=["infinite", "nan", "negative", "zero"],
)
def test_weights_that_are_not_a_density_raise(weight):
    with pytest.raises(ValueError, match="loss weight must be finite, not neg"):
        WeightProposal().check(with_weight(weight))


SECOND_MOMENTS = torch.tensor([4.0, 1.0, 0.0, 9.0], dtype=WIDE)
PLAIN = with_weight(torch.ones_like)


def seen(proposal, moments=SECOND_MOMENTS, times=8):
    """Let every bin be seen some times with a given second moment."""
    v = grid(len(moments)).repeat(times)
    root = moments.sqrt().repeat(times)
    proposal.observe(v, root, root)


def heights(proposal):
    return proposal(PLAIN, CPU)(grid(proposal.bins))


@pytest.mark.parametrize("moment", ["gradient", "loss"])
@pytest.mark.parametrize("floor", [0.1, 0.5, 1.0])
def test_the_learned_density_is_the_root_of_the_second_moment_over_a_floor(moment, floor):
    proposal = LearnedProposal(moment, bins=4, floor=floor)
    seen(proposal)
    proposal.advance()
    shape = torch.tensor([2.0, 1.0, 0.0, 3.0], dtype=WIDE) / 1.5
    torch.testing.assert_close(heights(proposal), (1 - floor) * shape + floor)


@pytest.mark.parametrize(("moment", "expected"), [("gradient", 6.0), ("loss", 4.0)])
def test_the_moment_is_that_of_the_gradient_or_of_the_loss(moment, expected):
    proposal = LearnedProposal(moment, bins=1)
    proposal.observe(grid(1), torch.tensor([3.0]), torch.tensor([2.0]))
    proposal.advance()
    assert proposal.table[:, 0].tolist() == [expected, 1.0, 1.0]


def test_it_is_the_base_density_until_every_bin_has_been_seen_eight_times():
    proposal = LearnedProposal(bins=4)
    seen(proposal, times=7)
    proposal.observe(grid(4)[:3], torch.ones(3), torch.ones(3))
    proposal.advance()
    assert torch.equal(heights(proposal), torch.ones(4, dtype=WIDE))
    proposal.observe(grid(4)[3:], torch.ones(1), torch.ones(1))
    proposal.advance()
    assert not torch.allclose(heights(proposal), torch.ones(4, dtype=WIDE), atol=0.1)


def test_it_is_the_base_density_where_there_is_no_loss():
    proposal = LearnedProposal(bins=4)
    seen(proposal, torch.zeros(4, dtype=WIDE))
    proposal.advance()
    assert torch.equal(heights(proposal), torch.ones(4, dtype=WIDE))


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.9])
def test_no_importance_weight_exceeds_one_over_the_floor(floor):
    proposal = LearnedProposal(bins=16, floor=floor)
    seen(proposal, torch.tensor([1e24] + 15 * [0.0], dtype=WIDE))
    proposal.advance()
    h = proposal(PLAIN, CPU)
    weight = 1 / h(h.icdf(grid(1000)))
    assert float(weight.max()) == pytest.approx(1 / floor, rel=1e-9)


def test_earlier_steps_decay_by_the_memory():
    proposal, memory = LearnedProposal(bins=2, memory=0.75), 0.75
    steps = [torch.tensor(x, dtype=WIDE) for x in ([4.0, 1.0], [1.0, 25.0], [9.0, 9.0])]
    counts = [8, 2, 5]
    for moments, count in zip(steps, counts, strict=True):
        seen(proposal, moments, count)
        proposal.advance()
    fade = [memory**2, memory, 1.0]
    mean = sum(f * n * m for f, n, m in zip(fade, counts, steps, strict=True))
    mean = mean / sum(f * n for f, n in zip(fade, counts, strict=True))
    shape = mean.sqrt() / mean.sqrt().mean()
    torch.testing.assert_close(heights(proposal), 0.9 * shape + 0.1)
    assert proposal.table[2].tolist() == [15.0, 15.0]


def test_a_step_draws_from_the_table_before_the_step():
    proposal = LearnedProposal(bins=4)
    seen(proposal)
    assert torch.equal(heights(proposal), torch.ones(4, dtype=WIDE))
    proposal.advance()
    first = heights(proposal)
    seen(proposal, SECOND_MOMENTS.flip(0), 100)
    assert torch.equal(heights(proposal), first)
    proposal.advance()
    assert not torch.allclose(heights(proposal), first, atol=0.1)


def test_more_bins_than_timesteps_raise():
    objective = table_weight(torch.ones(7, dtype=WIDE))
    LearnedProposal(bins=7).check(objective)
    with pytest.raises(ValueError, match="`bins` must be at most 7, the number of timest"):
        LearnedProposal(bins=8).check(objective)


@pytest.mark.parametrize("steps", [32, 33, 50, 63, 1000])
def test_every_bin_has_a_timestep_if_there_are_as_many(steps):
    density, proposal = UniformSteps(steps), LearnedProposal()
    v = density.cdf(torch.arange(steps, dtype=WIDE))
    proposal.observe(v, torch.ones_like(v), torch.ones_like(v))
    assert (proposal.observed[1] > 0).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.2, 0.7)])
def test_bins_are_of_the_given_times_truncated_or_not(proposal, part):
    """Half of a uniform density is a uniform density."""
    h, expected = (
        PROPOSALS[proposal](with_weight(torch.square, timesteps).between(*part), CPU)
        for timesteps in (Truncated(Uniform(0.1, 1.7), 0, 0.5), Uniform(0.1, 0.9))
    )
    torch.testing.assert_close(h(grid(999)), expected(grid(999)), rtol=1e-9, atol=1e-9)


def test_draws_are_counted_in_their_bin():
    proposal = LearnedProposal(bins=4)
    v = torch.tensor([0.0, 0.2499, 0.25, 0.6, 0.9999, 1.0], dtype=WIDE)
    proposal.observe(v, torch.ones(6), torch.arange(6.0))
    proposal.advance()
    assert proposal.table.tolist() == [[1, 2, 3, 9], [2, 1, 1, 2], [2, 1, 1, 2]]


def test_the_table_and_new_observations_are_in_the_state():
    first, second = LearnedProposal(bins=4), LearnedProposal(bins=4)
    seen(first)
    first.advance()
    seen(first, SECOND_MOMENTS.flip(0), 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(heights(first), heights(second))
    for proposal in (first, second):
        proposal.advance()
    assert torch.equal(heights(first), heights(second))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TableProposal([]), "`probabilities` must be finite, not negative"),
        (lambda: TableProposal([0.0, 0.0]), "and not all zero, got"),
        (lambda: TableProposal([1.0, -0.1]), "not negative"),
        (lambda: TableProposal([1.0, math.inf]), "must be finite"),
        (lambda: TableProposal([1.0, math.nan]), "must be finite"),
        (lambda: LearnedProposal("size"), "`moment` must .* got 'size'"),
        (lambda: LearnedProposal(bins=0), "`bins` must be at least 1, got 0"),
        (lambda: LearnedProposal(floor=0.0), "`floor` must be above 0 .* got 0.0"),
        (lambda: LearnedProposal(floor=1.1), "`floor` must .* at most 1, got 1.1"),
        (lambda: LearnedProposal(memory=1.0), "`memory` must .* between 0 and 1, got 1.0"),
        (lambda: LearnedProposal(memory=math.nan), "`memory` must .* got nan"),
    ],
)
def test_invalid_proposals_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()
