"""Target variance against closed forms, enumeration, and its own standard errors."""

import math
from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from lightning_vr.core.types import Clean, Noised, TargetEstimate
from lightning_vr.estimators.stf import STF
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.variance.removed_variance import RemovedVariance
from lightning_vr.variance.target_curves import TargetVarianceCurve
from lightning_vr.variance.target_measurement import (
    _error,
    measure_target_variance,
    noise_level_grid,
)

LIMIT = 4.0
"""Standard errors that a statistical test allows."""


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


def two_points(copies=1):
    return torch.tensor([[1.0], [-1.0]]).repeat(copies, 1)


def expectation(function, width=12.0):
    """E f(Z) over a standard normal, by the trapezoidal rule."""
    z = torch.linspace(-width, width, 20_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(function(z) * density, z))


def two_point_variance(s):
    """E (1 - tanh²(x_t / s²)), x_t = 1 + s Z: tr Cov[x0 | x_t] for x0 = ±1."""
    return expectation(lambda z: 1 - torch.tanh((1 + s * z) / s**2) ** 2)


def z_scores(measured, expected):
    return ((measured.mean - expected) / measured.error).abs()


@pytest.fixture
def cloud():
    return torch.randn(12, 2, generator=torch.Generator().manual_seed(5)).double()


def test_v_dsm_of_two_points_is_the_closed_form():
    noise_levels = levels(0.5, 1.0, 2.0, 4.0)
    curve = measure_target_variance(two_points(), noise_levels, [2], samples=8192, blocks=128)
    expected = levels(*(two_point_variance(float(s)) for s in noise_levels))
    # the values of the notes
    torch.testing.assert_close(
        expected, levels(0.068597, 0.4496, 0.795946, 0.941054), atol=2e-5, rtol=0
    )

    x0_space = curve.in_x0_space(curve.dsm)
    assert (z_scores(x0_space, expected) < LIMIT).all()
    assert (x0_space.error / expected < 0.05).all()
    torch.testing.assert_close(curve.dsm.mean, x0_space.mean / noise_levels**4)


def test_v_stf_of_two_points_halves_at_two_references_and_falls_with_more():
    """Many copies of ±1 make references independent; n = 2 is half of V_DSM at every level."""
    curve = measure_target_variance(
        two_points(512), levels(1.0, 2.0), [1, 2, 4, 16, 64], samples=2048, blocks=128
    )
    expected = {
        2: levels(0.4496, 0.795946) / 2,
        4: levels(0.097886, 0.186718),
        16: levels(0.020569, 0.043252),
        64: levels(0.004992, 0.010628),
    }
    for n, value in expected.items():
        measured = curve.in_x0_space(curve.stf[n])
        assert (z_scores(measured, value) < LIMIT).all(), n
        assert (measured.error < 0.15 * value).all(), n
    assert torch.equal(curve.stf[1].mean, curve.dsm.mean)
    assert (curve.ess[1].mean == 1).all()


def test_over_the_whole_data_set_v_stf_is_zero(cloud):
    curve = measure_target_variance(cloud, levels(0.1, 1.0, 10.0), [12, 11])
    assert (curve.stf[12].mean == 0).all()
    assert torch.isinf(curve.factor(12)).all()
    assert (curve.stf[11].mean > 0).all()


def two_gaussians_variance(s, dimension=64, std=0.1):
    """V_DSM of N(±1, std²): d std² / (s² τ²) + ‖μ‖² / τ⁴ E sech²(a² + a Z)."""
    tau = std**2 + s**2
    a = math.sqrt(dimension / tau)
    overlap = expectation(lambda z: 1 / torch.cosh((a**2 + a * z).clamp(-300, 300)) ** 2)
    return dimension * std**2 / (s**2 * tau) + dimension / tau**2 * overlap


def test_v_dsm_of_many_samples_of_two_gaussians_is_that_of_the_mixture():
    noise_levels = levels(1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 20.0, 50.0)
    table = levels(
        0.633663, 0.0402994, 0.0196515, 0.0136496, 0.0071798, 2.12585e-3, 3.48243e-4, 1.00866e-5
    )
    expected = levels(*(two_gaussians_variance(float(s)) for s in noise_levels))
    torch.testing.assert_close(expected, table, rtol=1e-3, atol=0)

    source = torch.Generator().manual_seed(0)
    x0 = two_points(1024) + 0.1 * torch.randn(2048, 64, generator=source)
    curve = measure_target_variance(x0, noise_levels, [512])
    # the samples' own variance is off that of the mixture by 1 / sqrt(2 N d) and more
    off = (curve.dsm.mean - expected).abs()
    assert (off < LIMIT * curve.dsm.error + 0.01 * expected).all()
    assert (curve.dsm.error < 0.1 * expected).all()
    # far out references are as good as drawn from all: n, and more as they are not drawn twice
    assert 0.7 * 512 < float(curve.factor(512)[-1]) < 1.3 * 512 * 2048 / (2048 - 512)


def enumerate_by_hand(x0, s, n, draws, group=None):
    """V_DSM, V_STF, D and ESS by one row after another, none sharing anything with the next."""
    source = torch.Generator().manual_seed(1)
    size = len(x0)
    own = torch.randint(size, (draws,), generator=source)
    xt = x0[own] + s * torch.randn(draws, x0.shape[1], generator=source, dtype=x0.dtype)
    distance = (xt[:, None] - x0).square().sum(2)
    if group is not None:
        distance = distance.masked_fill(group[own][:, None] != group, math.inf)
    weight = torch.softmax(-distance / (2 * s**2), dim=1)
    mean = weight @ x0
    dsm = (weight * (x0 - mean[:, None]).square().sum(2)).sum(1)

    order = torch.rand(draws, size, generator=source).scatter_(1, own[:, None], -1).argsort(1)
    chosen = torch.zeros(draws, size, dtype=torch.bool).scatter_(1, order[:, :n], True)
    part = torch.softmax((-distance / (2 * s**2)).masked_fill(~chosen, -math.inf), dim=1)
    stf = (part @ x0 - mean).square().sum(1)

    members = (distance < math.inf).sum(1, keepdim=True)
    y = 1 / (members * weight)
    f = torch.where(y < 1.5, (1 / y - 1) ** 2, 8 * y / 27 - 1 / 3)
    divergence = torch.where(weight > 0, weight * f, 8 / 27 / members)
    divergence = divergence.masked_fill(distance == math.inf, 0).sum(1)
    return {"dsm": dsm, "stf": stf, "divergence": divergence, "ess": 1 / (part**2).sum(1)}


@pytest.mark.parametrize("with_classes", [False, True], ids=["pooled", "classes"])
@pytest.mark.parametrize("s", [0.3, 1.0, 4.0])
def test_every_quantity_is_what_enumeration_by_hand_gives(cloud, s, with_classes):
    group = torch.arange(12) % 3 if with_classes else None
    by_hand = enumerate_by_hand(cloud, s, 5, 30_000, group)
    curve = measure_target_variance(cloud, levels(s), [5], group=group, samples=8192, blocks=64)
    measured = {
        "dsm": curve.in_x0_space(curve.dsm),
        "stf": curve.in_x0_space(curve.stf[5]),
        "divergence": curve.divergence,
        "ess": curve.ess[5],
    }
    for name, rows in by_hand.items():
        error = math.hypot(float(rows.std()) / len(rows) ** 0.5, float(measured[name].error))
        z = (float(measured[name].mean) - float(rows.mean())) / error
        assert abs(z) < LIMIT, (name, z)


def test_mean_spread_is_v_dsm_less_v_stf():
    x0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(2)).double()
    curve = measure_target_variance(x0, levels(0.7), [6], samples=4096, blocks=64)
    target = STF(6)
    target.fill(x0, None, indexed=True)

    source, spreads = torch.Generator().manual_seed(3), []
    for _ in range(250):
        index = torch.randint(64, (32,), generator=source)
        noise = torch.randn(32, 3, generator=source, dtype=torch.float64)
        s = torch.full((32,), 0.7, dtype=torch.float64)
        noised = Noised(x0[index] + 0.7 * noise, x0[index], noise, s, s / s, s, s / s, index=index)
        spreads.append(target(noised, Clean(x0[index], index=index), source).spread.mean() / 0.7**4)

    spread = torch.stack(spreads)
    error = math.hypot(
        float(spread.std()) / len(spread) ** 0.5,
        float(curve.dsm.error),
        float(curve.stf[6].error),
    )
    removed = float(curve.dsm.mean - curve.stf[6].mean)
    assert abs(float(spread.mean()) - removed) / error < LIMIT
    assert error < 0.05 * removed


@pytest.mark.parametrize("s", [0.6, 1.0, 2.5])
def test_mixing_the_two_estimates_of_v_stf_adds_no_bias(s):
    """Every own sample, every other reference and a fine grid of noise: nothing is drawn."""
    x0 = torch.tensor([[1.0], [-1.0], [0.4]], dtype=torch.float64)
    noise = torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None]
    weight = torch.exp(-0.5 * noise[:, 0] ** 2)
    mixed, defined = 0.0, 0.0
    for own, other in permutations(range(3), 2):
        xt = x0[own] + s * noise
        exact = posterior_mean(xt, 1.0, s, x0)
        part = posterior_mean(xt, 1.0, s, x0[[own, other]])
        target = TargetEstimate(part.mean, part.ess, part.spread)
        mixed += float(weight @ _error(target, exact, 2 / 3))
        defined += float(weight @ (part.mean - exact.mean).square().sum(1))
    assert mixed == pytest.approx(defined, rel=1e-9)


def test_standard_errors_cover_the_truth():
    z = {"dsm": [], 4: []}
    for seed in range(48):
        curve = measure_target_variance(
            two_points(128), levels(2.0), [4], samples=256, blocks=32, seed=seed
        )
        dsm, stf = curve.in_x0_space(curve.dsm), curve.in_x0_space(curve.stf[4])
        z["dsm"].append(float((dsm.mean - two_point_variance(2.0)) / dsm.error))
        # drawing 4 of 256 without replacement takes 3/255 off
        z[4].append(float((stf.mean - 0.186718 * (1 - 3 / 255)) / stf.error))

    assert 0.8 < torch.tensor(z["dsm"]).square().mean().sqrt() < 1.25
    assert 0.8 < torch.tensor(z[4]).square().mean().sqrt() < 1.4
    assert abs(torch.tensor(z[4]).mean()) < 0.5


def test_rows_that_share_references_in_the_far_field_hardly_count_apart():
    """16 rows of a block err nearly alike: the standard error is nearly that of 16 times fewer."""
    shared, apart = (
        measure_target_variance(two_points(128), levels(20.0), [4], samples=512, blocks=blocks)
        for blocks in (32, 512)
    )
    ratio = float(shared.stf[4].error / apart.stf[4].error)
    assert 2 < ratio < 4.5


def test_class_labels_mask_references():
    """Two classes that noise would mix: each has the curve that it has alone."""
    source = torch.Generator().manual_seed(4)
    x0, group = torch.randn(40, 2, generator=source), torch.arange(40) % 2
    settings = {"samples": 4096, "blocks": 64}
    noise_levels = levels(0.3, 1.0, 5.0)
    both = measure_target_variance(x0, noise_levels, [40], group=group, **settings)
    alone = [
        measure_target_variance(x0[group == c], noise_levels, [20], **settings) for c in (0, 1)
    ]

    mean = (alone[0].dsm.mean + alone[1].dsm.mean) / 2
    error = torch.stack([both.dsm.error, alone[0].dsm.error / 2, alone[1].dsm.error / 2])
    z = (both.dsm.mean - mean) / error.square().sum(0).sqrt()
    assert (z.abs() < LIMIT).all()
    assert (both.ess[40].mean <= 20 + 1e-9).all()

    pooled = measure_target_variance(x0, noise_levels, [40], **settings)
    assert (pooled.ess[40].mean > 1.5 * both.ess[40].mean)[1:].all()


def test_rows_whose_label_is_dropped_use_all_references():
    x0, group = torch.randn(30, 2, generator=torch.Generator().manual_seed(6)), torch.arange(30) % 3
    noise_levels = levels(0.3, 2.0)
    dropped = measure_target_variance(x0, noise_levels, [5], group=group, label_dropout=1.0)
    pooled = measure_target_variance(x0, noise_levels, [5])
    for name, values in pooled.columns().items():
        torch.testing.assert_close(dropped.columns()[name], values, rtol=1e-12, atol=0)


def test_scaling_the_data_scales_the_curve(cloud):
    plain = measure_target_variance(cloud, levels(0.5, 2.0), [4])
    scaled = measure_target_variance(10 * cloud, levels(5.0, 20.0), [4])
    torch.testing.assert_close(scaled.dsm.mean * 100, plain.dsm.mean)
    torch.testing.assert_close(scaled.stf[4].mean * 100, plain.stf[4].mean)
    torch.testing.assert_close(scaled.divergence.mean, plain.divergence.mean)


def test_far_from_the_origin_float32_data_keep_their_curve(cloud):
    plain = measure_target_variance(cloud.float(), levels(0.5, 2.0), [4])
    moved = measure_target_variance(cloud.float() + 1024, levels(0.5, 2.0), [4])
    torch.testing.assert_close(moved.dsm.mean, plain.dsm.mean, rtol=1e-3, atol=0)
    torch.testing.assert_close(moved.stf[4].mean, plain.stf[4].mean, rtol=1e-3, atol=0)


def test_the_divergence_runs_from_all_told_apart_to_none(cloud):
    curve = measure_target_variance(cloud, levels(1e-3, 1e3), [4])
    # one weight of 1 gives (N - 1)², the N - 1 weights of 0 give 8 / 27 N each
    torch.testing.assert_close(curve.divergence.mean[0], levels(121 + 11 * 8 / 27 / 12)[0])
    assert 0 <= float(curve.divergence.mean[1]) < 1e-4


def test_noise_levels_at_which_a_block_is_split_change_nothing(cloud, monkeypatch):
    noise_levels = levels(0.2, 0.5, 1.0, 2.0, 4.0)
    whole = measure_target_variance(cloud, noise_levels, [4])
    monkeypatch.setattr("lightning_vr.variance.target_measurement._BLOCK_ELEMENTS", 64)
    split = measure_target_variance(cloud, noise_levels, [4])
    for name, values in whole.columns().items():
        torch.testing.assert_close(split.columns()[name], values, rtol=1e-9, atol=1e-300)


def test_the_grid_spans_training_where_the_curves_change():
    x0 = torch.randn(200, 16, generator=torch.Generator().manual_seed(7))
    grid = noise_level_grid(x0, 1e-3, 1e3, 30)
    curve = measure_target_variance(x0, grid, [16], samples=256)
    variance = curve.in_x0_space(curve.dsm).mean
    total = float(x0.var(dim=0).sum())
    assert variance[0] < 1e-4 * total
    assert variance[15] > 0.1 * total
    assert 8 * total**0.5 < float(grid[-1]) < 12 * total**0.5
    torch.testing.assert_close(grid.log().diff(), grid.log().diff()[:1].expand(29))

    inside = noise_level_grid(x0, 2.0, 30.0, 5)
    torch.testing.assert_close(inside[[0, -1]], levels(2.0, 30.0))


@pytest.mark.parametrize("x0", [torch.ones(1, 3), torch.ones(7, 3)], ids=["one", "equal"])
def test_a_data_set_without_variance_has_a_curve_of_zeros(x0):
    grid = noise_level_grid(x0, 0.01, math.inf, 4)
    curve = measure_target_variance(x0, grid, [len(x0)])
    assert (curve.dsm.mean == 0).all()
    assert grid.isfinite().all()
    assert (grid > 0).all()


def test_a_curve_survives_a_checkpoint(cloud, tmp_path):
    curve = measure_target_variance(cloud, levels(0.5, 2.0), [1, 4, 12])
    torch.save(curve.state(), tmp_path / "state.pt")
    again = TargetVarianceCurve.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.columns().keys() == curve.columns().keys()
    assert {"dsm", "stf_4_error", "stf_all", "ess_all", "divergence"} <= again.columns().keys()
    for name, values in curve.columns().items():
        assert torch.equal(again.columns()[name], values)


def test_removed_variance_is_the_mean_spread_of_each_bin():
    noise_levels = levels(0.1, 1.0, 10.0)
    removed = RemovedVariance(noise_levels)
    removed.add(torch.tensor([0.9, 1.1, 3.0, 1e-3, 1e3, math.inf]), torch.arange(1.0, 7.0))
    first = removed.means()
    assert first.isnan().tolist() == [True, False, True]
    assert float(first[1]) == pytest.approx(2.0)

    resumed = RemovedVariance(noise_levels, removed.state())
    resumed.add(torch.tensor([1.0, 10.0]), torch.tensor([10.0, 5.0]))
    assert resumed.means()[1:].tolist() == pytest.approx([4.0, 5e-4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"references": [13]}, "`references` must be numbers between 1 and 12, .* got 13"),
        ({"references": [0]}, "`references`"),
        ({"noise_levels": levels(0.0, 1.0)}, "`noise_levels` must be positive"),
        ({"noise_levels": levels(1.0, math.inf)}, "`noise_levels`"),
        ({"samples": 8, "blocks": 9}, "2 <= blocks <= samples"),
        ({"samples": 1}, "2 <= blocks <= samples"),
        ({"x0": torch.tensor([[0.0], [math.nan]])}, "`x0` must be finite"),
        ({"x0": torch.arange(4)[:, None]}, "`x0` must be a real floating-point"),
    ],
)
def test_bad_input_is_refused(cloud, settings, message):
    arguments = {"x0": cloud, "noise_levels": levels(1.0), "references": [2]} | settings
    with pytest.raises(ValueError, match=message):
        measure_target_variance(**arguments)


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x0 = torch.randn(50, 3, generator=torch.Generator().manual_seed(8))
    curve = measure_target_variance(x0, levels(0.5, 2.0), [8], blocks=9)
    removed = RemovedVariance(levels(1.0, 10.0))
    removed.add(torch.ones(2 + rank), torch.full((2 + rank,), float(rank)))
    torch.save({"curve": curve.state(), "removed": removed.means()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_two_ranks_share_the_work_and_get_the_curve_of_one(tmp_path):
    multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    x0 = torch.randn(50, 3, generator=torch.Generator().manual_seed(8))
    alone = measure_target_variance(x0, levels(0.5, 2.0), [8], blocks=9).columns()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        curve = TargetVarianceCurve.from_state(found["curve"]).columns()
        assert all(torch.equal(curve[name], alone[name]) for name in alone)
        assert float(found["removed"][0]) == pytest.approx(3 / 5)
