"""Loss, floor and distance on fixed draws: exact denoisers, closed forms, brackets."""

import math

import pytest
import torch

from lightning_vr.core.types import Clean
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import EDM, VP, RectifiedFlow
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.variance import fixed_draws
from lightning_vr.variance.convergence import ConvergenceMeasurement, made_of
from lightning_vr.variance.convergence_curves import loss_curves, records_from, records_state
from lightning_vr.variance.fixed_draws import FixedDraws, LevelTimes
from lightning_vr.variance.optimum import Population

LEVELS = 8


def points(kind, count=300, dim=3):
    """Normal points, two of them, or heavy tails, in float64."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(count, dim, generator=source, dtype=torch.float64)
    if kind == "two points":
        return torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    if kind == "heavy tails":  # Student's t with one degree of freedom
        return x / torch.randn(count, 1, generator=source, dtype=torch.float64).abs()
    return x


SETTINGS = {
    "edm": (EDM(), LogUniform(0.05, 20.0), "edm"),
    "vp-epsilon": (VP(), None, "epsilon"),
    "vp-v": (VP(), None, "v"),
    "flow": (RectifiedFlow(), None, "velocity"),
}


def squared_error(denoiser, schedule, kind, weight=1.0):
    """The loss of each draw in the space of what is predicted, for a given x0_hat of x_t."""

    def losses(noised):
        xt = schedule.perturb(noised.x0, noised.noise, noised.t)
        coefficients = prediction(kind, schedule, noised.t)
        target = coefficients.output(noised.x0, noised.noise, noised.x0)
        found = coefficients.output(noised.x0, noised.noise, denoiser(xt, noised))
        return weight * (found - target).square().mean(dim=1)

    return losses


def posterior_of(x, offset=0.0):
    """The exact denoiser of a data set, plus an offset that grows with the noise level."""

    def denoiser(xt, noised):
        mean = posterior_mean(xt, noised.alpha, noised.sigma, x).mean
        return mean + offset * noised.noise_level.clamp(max=1)[:, None]

    return denoiser


def draws(x, times, schedule, name="train", count=64):
    index = torch.arange(min(count, len(x))) * len(x) // min(count, len(x))
    return FixedDraws(name, Clean(x[index], index=index), times, schedule)


def population(x, count=None):
    count = count or len(x)
    index = torch.arange(count) * len(x) // count
    return Population.prepare(Clean(x[index], index=index), len(x))


def measurement(x, losses, setting="edm", count=None, samples=64, held_out=None):
    schedule, density, _ = SETTINGS[setting]
    times = LevelTimes.stratified(
        schedule, density or schedule.default_timesteps(), LEVELS, samples
    )
    others = None if held_out is None else draws(held_out, times, schedule, "held-out", samples)
    train = draws(x, times, schedule, count=samples)
    device = torch.device("cpu")
    return ConvergenceMeasurement(train, others, population(x, count), losses, 256, device)


def two_point_variance(levels):
    """E (1 - tanh²(x_t / s²)), x_t = 1 + s Z, by the trapezoidal rule: V for x0 = ±1."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    s = levels[:, None]
    return torch.trapezoid((1 - torch.tanh((1 + s * z) / s**2) ** 2) * density, z)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["normal", "two points", "heavy tails"])
def test_the_exact_denoiser_is_at_distance_zero_at_every_noise_level(setting, kind):
    x = points(kind)
    schedule, _, space = SETTINGS[setting]
    losses = squared_error(posterior_of(x), schedule, space, weight=3.0)
    found = measurement(x, losses, setting)
    curves = loss_curves(found.floors, found.measure(0, losses))
    assert (curves.excess.mean <= 2 * curves.excess.error).all()
    assert (curves.excess.mean <= 1e-12 * curves.loss.mean.max()).all()
    torch.testing.assert_close(curves.loss.mean, curves.floor.mean, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_in_float32_the_exact_denoiser_is_at_zero_within_two_standard_errors(kind):
    x = points(kind).float()
    losses = squared_error(posterior_of(x), VP(), "epsilon")
    found = measurement(x, losses, "vp-epsilon")
    excess = loss_curves(found.floors, found.measure(0, losses)).excess
    assert (excess.mean <= 2 * excess.error).all()
    assert float(excess.error.max()) < 1e-5


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_offset_adds_its_weighted_square_whatever_the_network_predicts(setting):
    x, offset = points("normal"), torch.tensor([0.3, -0.4, 0.1]).double()
    schedule, _, space = SETTINGS[setting]
    found = measurement(x, squared_error(posterior_of(x), schedule, space), setting)
    record = found.measure(0, squared_error(posterior_of(x, offset), schedule, space))
    expected = []
    for _, noised in found.train.batches(64, torch.device("cpu")):
        b = prediction(space, schedule, noised.t).b.double()
        square = noised.noise_level.clamp(max=1) ** 2 * offset.square().sum()
        expected.append((square / b**2 / 3).mean())
    excess = loss_curves(found.floors, record).excess.mean
    torch.testing.assert_close(excess, torch.stack(expected), rtol=1e-5, atol=1e-12)


def test_the_direct_distance_has_the_mean_of_the_difference_and_a_smaller_error():
    x, offset = points("normal"), torch.tensor([0.1, 0.0, 0.0]).double()
    losses = squared_error(posterior_of(x, offset), EDM(), "x0")
    found = measurement(x, losses, samples=512)
    direct = found.measure(0, losses).direct
    plain = torch.stack(
        [losses(noised) for _, noised in found.train.batches(512, torch.device("cpu"))]
    )
    difference = plain.reshape(LEVELS, -1, 16).mean(dim=1) - found.floors.low
    z = (difference - direct).mean(dim=1) / ((difference - direct).std(dim=1) / 4)
    assert float(z.abs().max()) < 4
    ratio = difference.std(dim=1) / direct.std(dim=1).clamp(min=1e-12)
    assert float(ratio[2:].min()) > 5


@pytest.mark.parametrize("setting", ["vp-epsilon", "flow"])
def test_the_weight_of_a_given_loss_is_found_from_the_loss_alone(setting):
    x = points("normal")
    schedule, _, space = SETTINGS[setting]
    losses = squared_error(posterior_of(x, 0.1), schedule, space, weight=2.0)
    found = measurement(x, losses, setting)
    for level, (_, noised) in enumerate(found.train.batches(64, torch.device("cpu"))):
        b = prediction(space, schedule, noised.t).b.double()
        torch.testing.assert_close(found._scale[level], 2 / b**2 / 3, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("function", [torch.abs, lambda x: torch.where(x.abs() < 1, x**2, x.abs())])
def test_a_loss_that_is_no_squared_error_is_refused(function):
    x = points("normal")

    def losses(noised):
        xt = VP().perturb(noised.x0, noised.noise, noised.t)
        return function(0.5 * xt - noised.noise).mean(dim=1)

    with pytest.raises(ValueError, match="`loss` must be a squared error"):
        measurement(x, losses, "vp-epsilon")


def test_a_draw_made_of_other_samples_has_the_same_noised_sample():
    x = points("normal")
    found = measurement(x, squared_error(posterior_of(x), VP(), "v"), "vp-v")
    for _, noised in found.train.batches(64, torch.device("cpu")):
        other = made_of(noised, noised.x0.flip(0))
        torch.testing.assert_close(VP().perturb(other.x0, other.noise, other.t), noised.xt)


def test_times_are_stratified_in_equally_likely_bins_of_increasing_noise():
    for schedule in (EDM(), VP(), RectifiedFlow()):
        density = schedule.default_timesteps()
        times = LevelTimes.stratified(schedule, density, 5, 32)
        u = density.cdf(times.times.double()).sort(dim=1).values[:, ::2].flatten()
        assert ((u * 80).floor() - torch.arange(80)).abs().max() <= 1  # float32 may cross an edge
        assert len(u.unique()) == 80
        assert (times.noise_levels.diff() > 0).all()
        assert (times.noise_levels[:-1] < times.edges).all()
        assert (times.edges < times.noise_levels[1:]).all()


def test_draws_are_the_same_each_time_and_others_for_another_set():
    x = points("normal")
    found = measurement(x, squared_error(posterior_of(x), EDM(), "edm"), held_out=x)
    sets = [found.train, found.train, found.held_out]
    first, again, other = (
        torch.cat([n.noise for _, n in s.batches(7, torch.device("cpu"))]) for s in sets
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().unique().numel() == first.numel()


def test_a_rank_beyond_the_number_of_draws_has_none(monkeypatch):
    x = points("normal")
    found = measurement(x, squared_error(posterior_of(x), EDM(), "edm"))
    monkeypatch.setattr(fixed_draws, "rank", lambda: 70)
    monkeypatch.setattr(fixed_draws, "world_size", lambda: 80)
    assert not list(found.train.batches(8, torch.device("cpu")))
    assert not len(found.train.local_rows)


def test_the_floor_of_two_points_is_the_closed_form_rare_events_included():
    """At low noise no draw meets the event that makes the floor: the error says so."""
    x = points("two points")
    losses = squared_error(posterior_of(x), EDM(), "x0")
    found = measurement(x, losses, samples=256)
    floor = loss_curves(found.floors, found.measure(0, losses)).floor
    expected = torch.stack(
        [two_point_variance(t.double()).mean() / 2 for t in found.train.level_times.times]
    )
    assert ((floor.mean - expected).abs() <= 2.5 * floor.error + 1e-15).all()
    low = floor.mean < 0.5 * expected
    assert bool(low.any()), "some level is rare"
    assert (floor.error[low] < 3 * expected[low]).all(), "and the bound is tight there"


def test_a_bound_by_pairs_and_the_linear_denoiser_bound_the_floor_of_any_data():
    for kind in ("normal", "heavy tails"):
        x = points(kind)
        found = measurement(x, squared_error(posterior_of(x), EDM(), "x0"), samples=256)
        floor = found.floors.low.mean(dim=1)
        pairs, linear = [], []
        for _, noised in found.train.batches(256, torch.device("cpu")):
            pairs.append(found.population.pair_bound(noised).mean() / 3)
            linear.append(found.population.linear_bound(noised).mean() / 3)
        slack = 3 * found.floors.low.std(dim=1) / 4
        assert (torch.stack(pairs) > floor - slack).all()
        assert (torch.stack(linear) > floor - slack).all()


def bracket(seed, size=1500, count=500):
    """Bounds of the floor from a subset, and its exact value by all samples at many draws."""
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)).double()
    x = x * torch.tensor([1.0, 0.5, 0.2, 0.1])
    losses = squared_error(posterior_of(x), EDM(), "x0")
    exact = measurement(x, losses, samples=256).floors
    found = measurement(x, losses, count=count, samples=128)
    return loss_curves(found.floors, found.measure(0, losses)), exact.low


def holds(curves, exact):
    """Whether the bracket holds the exact value at every level, three standard errors wider."""
    mean, error = exact.mean(dim=1), exact.std(dim=1) / 4
    low, high = curves.floor_low, curves.floor_high
    below = low.mean - 3 * torch.hypot(low.error, error) <= mean
    above = mean <= high.mean + 3 * torch.hypot(high.error, error)
    return bool((below & above).all())


def check_brackets(seeds):
    found = [bracket(seed) for seed in seeds]
    assert all(holds(*each) for each in found)
    for curves, exact in found:
        known = curves.floor_high.mean < 1.3 * curves.floor_low.mean
        assert known.sum() >= 3, "the bracket is narrow at high noise"
        wrong = (curves.floor.mean - exact.mean(dim=1)).abs()
        assert (wrong < 3 * torch.hypot(curves.floor.error, exact.std(dim=1) / 4)).all()
        assert (curves.excess_low.mean <= curves.excess.mean).all()
        assert (curves.excess.mean <= curves.excess_high.mean + 1e-12).all()


def test_from_a_subset_the_bracket_holds_the_exact_floor():
    check_brackets(range(2))


@pytest.mark.slow
def test_from_twenty_subsets_the_bracket_holds_the_exact_floor():
    check_brackets(range(20))


def test_the_subset_of_all_samples_is_exact_and_a_larger_one_has_a_narrower_bracket():
    x = points("normal", 400)
    losses = squared_error(posterior_of(x), EDM(), "x0")
    widths = []
    for count in (50, 200, 400):
        floors = measurement(x, losses, count=count).floors
        widths.append(float((floors.high - floors.low).mean()))
        assert floors.is_exact == (count == 400)
    assert widths[0] > widths[1] > widths[2] == 0


def test_held_out_bounds_hold_the_floor_of_a_known_distribution():
    """Of normal data V is known: d s² / (1 + s²)."""
    source = torch.Generator().manual_seed(0)
    x, other = (torch.randn(n, 3, generator=source).double() for n in (300, 256))
    losses = squared_error(posterior_of(x), EDM(), "x0")
    floors = measurement(x, losses, samples=256, held_out=other).floors
    squared = LevelTimes.stratified(EDM(), LogUniform(0.05, 20.0), LEVELS, 256).times.double() ** 2
    exact = (squared / (1 + squared)).mean(dim=1)
    error = 2.5 * floors.held_out_high.std(dim=1) / 4
    assert (floors.held_out_low.mean(dim=1) <= exact + error).all()
    assert (floors.held_out_high.mean(dim=1) >= exact - error).all()


def test_labels_mask_references_and_a_class_of_one_has_bounds():
    x, group = points("normal", 60), torch.arange(60) % 3
    group[7] = 5
    index = torch.arange(60)
    schedule = EDM()
    times = LevelTimes.stratified(schedule, LogUniform(0.05, 20.0), LEVELS, 64)
    train = FixedDraws("train", Clean(x, group, index=index), times, schedule)
    whole = Population.prepare(Clean(x, group, index=index), 60)
    for _, noised in train.batches(64, torch.device("cpu")):
        found = whole.optimum(noised)
        alone = noised.group == 5
        assert alone.any()
        torch.testing.assert_close(found.x0[alone], noised.x0[alone])
        own = posterior_mean(
            noised.xt,
            noised.alpha,
            noised.sigma,
            x,
            query_group=noised.group,
            reference_group=group,
        )
        torch.testing.assert_close(found.x0, own.mean, rtol=1e-6, atol=1e-6)
        held_out = whole.optimum(noised, is_held_out=True)
        assert bool(held_out.high.isfinite().all())
        part = Population.prepare(Clean(x[::2], group[::2], index=index[::2]), 60).optimum(noised)
        assert (part.low <= part.high + 1e-9)[~alone].any()
        assert bool(part.middle.isfinite().all())


def test_records_come_back_from_a_checkpoint(tmp_path):
    x = points("normal")
    losses = squared_error(posterior_of(x, 0.1), EDM(), "x0")
    found = measurement(x, losses, held_out=x)
    records = [found.measure(step, losses) for step in (0, 5)]
    torch.save(records_state(records), tmp_path / "state.pt")
    again = records_from(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [record.step for record in again] == [0, 5]
    assert torch.equal(again[1].direct, records[1].direct)
    assert torch.equal(again[1].held_out, records[1].held_out)
    assert records_from(records_state([])) == []
