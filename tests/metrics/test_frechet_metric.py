"""The Fréchet distance against closed forms and scipy, and the sums it is streamed from."""

import copy
import pickle
from itertools import combinations

import pytest
import torch
from scipy import linalg
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_vr.data.digits import digits
from lightning_vr.metrics import (
    DigitFeatures,
    Features,
    FrechetMetric,
    IdentityFeatures,
    RandomConvFeatures,
    frechet_distance,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(size, rank=None, seed=0):
    factor = draws(size, rank or size, seed=seed).double()
    return factor @ factor.T / size


def points_metric():
    return FrechetMetric(IdentityFeatures(3))


def filled(real, generated, metric=None):
    metric = metric or points_metric()
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric


REAL = draws(200, 3, seed=1)
GENERATED = draws(150, 3, seed=2) @ torch.tensor([[1.0, 0.5, 0], [0, 2, 0], [0, 0, 0.1]]) + 0.3


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_distance_is_that_of_the_matrix_square_root_of_scipy(size):
    a, b = covariance(size, seed=1), covariance(size, seed=2)
    mean_a, mean_b = draws(2, size, seed=3).double()

    root = torch.as_tensor(linalg.sqrtm((a @ b).numpy()).real)
    expected = (mean_a - mean_b).square().sum() + torch.trace(a + b - 2 * root)

    torch.testing.assert_close(
        frechet_distance(mean_a, a, mean_b, b), expected, rtol=1e-9, atol=1e-9
    )


def test_covariances_that_commute_are_apart_by_the_roots_of_their_eigenvalues():
    basis = torch.linalg.qr(draws(8, 8).double()).Q
    a, b = torch.arange(8).double(), torch.linspace(0.1, 3, 8).double()
    mean = torch.zeros(8)

    found = frechet_distance(mean, basis * a @ basis.T, mean + 1, basis * b @ basis.T)

    torch.testing.assert_close(found, 8 + (a.sqrt() - b.sqrt()).square().sum())


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_equal_distributions_are_at_distance_zero_even_where_singular(rank):
    a = covariance(20, rank)
    mean = draws(20).double()
    assert 0 <= frechet_distance(mean, a, mean, a) < 1e-5


def test_the_distance_is_symmetric_and_never_negative():
    sets = [(draws(12, seed=s), covariance(12, rank=s + 1, seed=s)) for s in range(6)]
    for a, b in combinations(sets, 2):
        torch.testing.assert_close(
            frechet_distance(*a, *b), frechet_distance(*b, *a), rtol=1e-6, atol=1e-6
        )
    nearly = [frechet_distance(*a, a[0], a[1] * (1 + 1e-14)) for a in sets]
    assert min(nearly) >= 0


def test_orthogonal_maps_of_the_features_do_not_change_the_distance():
    turn = torch.linalg.qr(draws(3, 3, seed=5)).Q
    before = filled(REAL, GENERATED).compute()
    torch.testing.assert_close(
        filled(REAL @ turn, GENERATED @ turn).compute(), before, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean_b", torch.zeros(3), r"`mean_b` must have shape \(2,\), got \(3,\)"),
        ("covariance_a", torch.eye(3), r"`covariance_a` must have shape \(2, 2\), got \(3, 3\)"),
        ("mean_a", torch.tensor([0.0, torch.nan]), "`mean_a` must be finite, but 1 of 2"),
        ("covariance_b", torch.eye(2) * torch.inf, "`covariance_b` must be finite"),
        ("covariance_b", torch.eye(2) * 1j, "`covariance_b` must be real, got torch.complex64"),
    ],
)
def test_invalid_moments_are_refused_by_name(name, value, message):
    arguments = {"mean_a": torch.zeros(2), "covariance_a": torch.eye(2)}
    arguments |= {"mean_b": torch.zeros(2), "covariance_b": torch.eye(2)}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**arguments | {name: value})


def test_the_streamed_distance_is_that_of_the_unbiased_moments_of_all_samples():
    metric = points_metric()
    for real, generated in zip(REAL.split(70), GENERATED.split(60), strict=True):
        filled(real, generated, metric)

    (a, b) = REAL.double(), GENERATED.double()
    expected = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))

    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=0)


def test_the_distance_is_that_of_torchmetrics_where_covariances_are_regular():
    metric = filled(REAL, GENERATED)
    expected = FrechetInceptionDistance.compute(metric)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)


def test_the_distance_of_two_normals_is_found_within_its_sampling_error():
    a, b = draws(100_000, 3, seed=3), 2 * draws(100_000, 3, seed=4) + torch.tensor([1.0, 0, 0])
    assert filled(a, b).compute().item() == pytest.approx(1 + 3, abs=0.05)


def test_merging_two_halves_equals_the_whole():
    first = filled(REAL[:90], GENERATED[:40])
    first.merge_state(filled(REAL[90:], GENERATED[40:]))
    torch.testing.assert_close(
        first.compute(), filled(REAL, GENERATED).compute(), rtol=1e-12, atol=0
    )


def test_an_empty_metric_equals_what_is_merged_into_it():
    empty, whole = points_metric(), filled(REAL, GENERATED)
    empty.merge_state(whole)
    assert torch.equal(empty.compute(), whole.compute())


def test_a_merge_is_seen_by_a_metric_that_has_already_computed():
    metric = filled(REAL[:90], GENERATED)
    before = metric.compute()
    metric.merge_state(filled(REAL[90:], GENERATED))
    assert metric.compute() != before


def test_a_loaded_state_computes_what_the_saved_one_did_without_an_update():
    saved = filled(REAL, GENERATED)
    fresh = points_metric()
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh.compute(), saved.compute())


def test_a_loaded_state_takes_the_device_and_precision_of_the_metric():
    state = {name: sums.half() for name, sums in points_metric().state_dict().items()}
    metric = points_metric().to("meta")
    metric.load_state_dict(state)
    assert {sums.device.type for sums in metric.metric_state.values()} == {"meta"}
    assert metric.real_features_cov_sum.dtype == torch.float64
    assert metric.real_features_num_samples.dtype == torch.int64


def test_updates_after_loading_leave_the_checkpoint_alone():
    state = filled(REAL, GENERATED).state_dict()
    before = copy.deepcopy(state)
    metric = points_metric()
    metric.load_state_dict(state)
    filled(REAL, GENERATED, metric)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_the_state_dict_holds_sums_and_no_weights_of_the_features():
    metric = FrechetMetric(DigitFeatures())
    sides = {
        f"{side}_features_{name}"
        for side in ("real", "fake")
        for name in ("num_samples", "sum", "cov_sum")
    }
    assert set(metric.state_dict()) == sides
    assert list(metric.parameters()) == []


def test_a_metric_inside_a_module_keeps_its_state_under_the_prefix_of_the_module():
    saved, fresh = (nn.ModuleDict({"frechet": points_metric()}) for _ in range(2))
    filled(REAL, GENERATED, saved["frechet"])
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh["frechet"].compute(), saved["frechet"].compute())


def test_a_state_of_other_features_or_with_parts_missing_is_not_loaded():
    state = filled(REAL, GENERATED).state_dict()
    with pytest.raises(
        RuntimeError, match=r"`real_features_sum` must have shape \(2,\), got \(3,\)"
    ):
        FrechetMetric(IdentityFeatures(2)).load_state_dict(state)
    del state["real_features_sum"]
    with pytest.raises(RuntimeError, match=r"Missing key.*real_features_sum"):
        points_metric().load_state_dict(state)


def test_pickled_and_cloned_metrics_are_independent():
    metric = filled(REAL, GENERATED)
    expected = metric.compute()
    for twin in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(twin.compute(), expected)
        twin.update(GENERATED, real=True)
    assert torch.equal(metric.compute(), expected)


def test_reset_forgets_both_sides_or_the_generated_one_only():
    keeping = FrechetMetric(IdentityFeatures(3), reset_real_features=False)
    filled(REAL, REAL + 5, keeping).reset()
    keeping.update(GENERATED, real=False)
    assert torch.equal(keeping.compute(), filled(REAL, GENERATED).compute())

    metric = filled(REAL, GENERATED)
    metric.reset()
    assert metric.real_features_num_samples == metric.fake_features_num_samples == 0
    assert metric.real_features_cov_sum.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sums_and_the_features_keep_their_precision_in_a_module_of_another(dtype):
    metric = FrechetMetric(RandomConvFeatures(dimension=3))
    nn.ModuleDict({"frechet": metric}).to(dtype)
    metric.half()

    assert metric.real_features_sum.dtype == metric.fake_features_cov_sum.dtype == torch.float64
    assert metric.features(torch.zeros(2, 1, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize("side", ["real", "generated"])
def test_fewer_samples_than_features_plus_one_are_refused(side):
    def metric(count):
        few = REAL[:count]
        return filled(few, GENERATED) if side == "real" else filled(REAL, few)

    assert metric(4).compute() > 0
    with pytest.raises(ValueError, match=f"The {side} side must have at least 4 samples .*, got 3"):
        metric(3).compute()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.tensor([[1.0, 2, torch.inf]]), "^generated images must be finite, but 1 of 3"),
        (torch.full((2, 3), torch.nan), "^generated images must be finite, but 6 of 6"),
        (torch.zeros(2, 3, dtype=torch.complex64), "`images` must be floating point"),
        (torch.zeros(2, 3, dtype=torch.uint8), r"images / 127.5 - 1"),
    ],
)
def test_invalid_images_are_refused_and_leave_the_sums_unchanged(images, message):
    metric = filled(REAL, GENERATED)
    before = metric.compute()
    with pytest.raises(ValueError, match=message):
        metric.update(images, real=False)
    assert torch.equal(metric.compute(), before)


def test_features_that_overflow_are_refused():
    class Overflow(nn.Module):
        def forward(self, x):
            return x / 0

    metric = FrechetMetric(Features(Overflow(), dimension=3))
    with pytest.raises(ValueError, match="features 'Overflow' of the real images must be finite"):
        metric.update(torch.ones(2, 3), real=True)


def test_a_plain_module_is_refused_with_the_way_to_wrap_it():
    with pytest.raises(ValueError, match=r"Flatten: wrap .* Features\(network, dimension="):
        FrechetMetric(nn.Flatten())


def test_a_value_per_batch_is_refused_and_nothing_is_lost():
    metric = filled(REAL, GENERATED)
    with pytest.raises(TypeError, match="no value per batch"):
        metric(REAL, real=True)
    assert metric.real_features_num_samples == 200


@pytest.mark.parametrize("features", [DigitFeatures(), RandomConvFeatures()], ids=lambda f: f.name)
def test_real_halves_are_closer_than_digits_dropped_blurred_or_noisy(features):
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, second = images[order[:898]], images[order[898:]]
    kernel = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1]))[None, None] / 16
    padded = F.pad(second, (1, 1, 1, 1), value=-1)

    def distance(generated):
        return filled(first, generated, FrechetMetric(features)).compute().item()

    halves = distance(second)
    noise = torch.rand(second.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert distance(second[labels[order[898:]] > 1]) > 2 * halves
    assert distance(F.conv2d(padded, kernel)) > 20 * halves
    assert distance(second + 0.5 * draws(*second.shape)) > 2 * halves
    assert distance(noise) > 40 * halves


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_accelerator_gives_the_distance_of_the_cpu():
    images = draws(2, 300, 1, 8, 8).clamp(-1, 1)
    expected = filled(images[0], images[1] * 0.8, FrechetMetric(DigitFeatures())).compute()

    metric = FrechetMetric(DigitFeatures()).to("cuda")
    metric.load_state_dict(FrechetMetric(DigitFeatures()).state_dict())
    with torch.autocast("cuda", torch.bfloat16):
        filled(images[0].cuda(), images[1].cuda() * 0.8, metric)

    assert metric.compute().device.type == "cuda"
    torch.testing.assert_close(metric.compute().cpu(), expected, rtol=1e-2, atol=0)
