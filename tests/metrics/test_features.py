"""Feature extractors: frozen, in float32, of the stated shapes, offline."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchmetrics.image.fid
from torch import nn

import lightning_vr.metrics
from lightning_vr.metrics import (
    ClassifierFeatures,
    DigitFeatures,
    Features,
    IdentityFeatures,
    ImageClassifier,
    InceptionFeatures,
    RandomConvFeatures,
)


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("build", [DigitFeatures, RandomConvFeatures], ids=lambda b: b.__name__)
def test_features_are_float32_without_gradient_whatever_surrounds_them(build):
    features = build()
    expected = features(images(4, 1, 8, 8))
    features.train()

    with torch.autocast("cpu", torch.bfloat16):
        found = features(images(4, 1, 8, 8).double().requires_grad_())

    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in features.parameters())


@pytest.mark.parametrize("build", [DigitFeatures, RandomConvFeatures], ids=lambda b: b.__name__)
def test_building_features_leaves_the_global_random_state_alone(build):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


def test_random_convolutions_depend_on_their_seed_alone():
    torch.manual_seed(1)
    first = RandomConvFeatures(seed=5)(images(4, 1, 8, 8))
    torch.manual_seed(2)
    assert torch.equal(RandomConvFeatures(seed=5)(images(4, 1, 8, 8)), first)
    assert not torch.allclose(RandomConvFeatures(seed=6)(images(4, 1, 8, 8)), first)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 7, 12), (4, 32, 32)])
@pytest.mark.parametrize("dimension", [1, 64])
def test_random_convolutions_take_images_of_any_size_and_channels(shape, dimension):
    features = RandomConvFeatures(channels=shape[0], dimension=dimension)
    found = features(images(5, *shape))
    assert found.shape == (5, dimension)
    assert found.std() > 0


@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
def test_identity_features_are_the_samples_themselves(shape):
    points = images(6, *shape)
    features = IdentityFeatures(points[0].numel())
    assert torch.equal(features(points), points.flatten(1))


def test_digit_probabilities_sum_to_one_and_follow_from_the_features():
    features = DigitFeatures()
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = features.probabilities(images(7, 1, 8, 8))

    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(7))
    logits = features(images(7, 1, 8, 8)) @ features.head.weight.T + features.head.bias
    torch.testing.assert_close(probabilities, logits.softmax(dim=1))


def test_a_network_of_ones_own_is_copied_frozen_and_left_as_it_was():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    features = Features(network, dimension=2)
    before = features(images(3, 4))

    features.train()
    with torch.no_grad():
        network[2].weight += 1

    assert torch.equal(features(images(3, 4)), before)
    assert features.name == "Sequential"
    assert network.training
    assert network[2].weight.requires_grad


@pytest.mark.parametrize(
    ("features", "shape", "expected"),
    [
        (DigitFeatures(), (2, 3, 8, 8), r"\(B, 1, 8, 8\)"),
        (DigitFeatures(), (1, 8, 8), r"\(B, 1, 8, 8\)"),
        (RandomConvFeatures(channels=3), (2, 1, 8, 8), r"\(B, 3, any, any\)"),
        (IdentityFeatures(2), (5, 3), r"features of shape \(5, 2\) .* got \(5, 3\)"),
        (Features(nn.Identity(), 2), (5, 2, 1), r"correct `dimension`, which is 2, or flatten"),
    ],
)
def test_samples_of_another_shape_are_refused_with_the_shape_expected(features, shape, expected):
    with pytest.raises(ValueError, match=expected) as refusal:
        features(torch.zeros(shape))
    assert "\n" not in str(refusal.value)


def test_images_that_are_not_floating_point_are_refused():
    with pytest.raises(ValueError, match=r"got torch.uint8: scale bytes by images / 127.5 - 1"):
        DigitFeatures()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="`dimension` must be at least 1, got 0"):
        IdentityFeatures(0)
    with pytest.raises(ValueError, match="`channels` must be at least 1, got 0"):
        RandomConvFeatures(channels=0)


def test_inception_without_its_weights_file_says_that_nothing_is_downloaded(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"an existing file, got .*missing.pth': nothing is down"
    ):
        InceptionFeatures(tmp_path / "missing.pth")


def test_inception_without_torch_fidelity_names_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-vr\[inception\]"):
        InceptionFeatures(tmp_path / "weights.pth")


def test_inception_is_given_the_levels_of_an_image_file_clamped_and_rounded(tmp_path, monkeypatch):
    class Recorder(nn.Module):
        def __init__(self, name, features_list, path, antialias):
            super().__init__()
            torch.rand(1)
            assert (features_list, path, antialias) == (["2048"], str(weights), False)

        def forward(self, levels):
            assert levels.dtype == torch.uint8
            return levels.flatten(1).float().repeat(1, 2048 // 3 + 1)[:, :2048]

    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", Recorder)

    before = torch.get_rng_state()
    features = InceptionFeatures(weights)
    assert torch.equal(torch.get_rng_state(), before)

    values = torch.tensor([-1.004, 0.0, 1.004, -1.0, 0.999, 1.0]).view(2, 3, 1, 1)
    assert features(values)[:, :3].tolist() == [[0, 128, 255], [0, 255, 255]]


def test_the_metrics_import_no_package_that_they_can_do_without():
    heavy = {"sklearn", "matplotlib", "diffusers", "torch_fidelity", "lightning", "scipy"}
    folder = Path(lightning_vr.metrics.__file__).parent
    for name in ("__init__.py", "features.py", "frechet_metric.py"):
        body = ast.parse((folder / name).read_text()).body
        imported = {
            alias.name for node in body if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
        assert not heavy & {module.split(".")[0] for module in imported}


class TestClassifierFeatures:
    @pytest.fixture
    def weights(self, tmp_path):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classifier = ImageClassifier(channels=3, size=8, num_classes=2)
        classifier(images(16, 3, 8, 8))  # moves running statistics
        classifier.save(tmp_path / "classifier.pt")
        return tmp_path / "classifier.pt", classifier.eval()

    def test_they_are_those_of_the_saved_classifier_and_draw_nothing(self, weights):
        path, classifier = weights
        before = torch.get_rng_state()
        features = ClassifierFeatures(path)
        assert torch.equal(torch.get_rng_state(), before)
        with torch.no_grad():
            found = features(images(4, 3, 8, 8))
            torch.testing.assert_close(found, classifier.features(images(4, 3, 8, 8)))
            logits = found @ classifier.head.weight.T + classifier.head.bias
            torch.testing.assert_close(logits, classifier(images(4, 3, 8, 8)))

    def test_other_weights_have_another_name(self, weights, tmp_path):
        path, classifier = weights
        name = ClassifierFeatures(path).name
        with torch.no_grad():
            classifier.head.bias += 1
        classifier.save(tmp_path / "other.pt")
        assert ClassifierFeatures(tmp_path / "other.pt").name != name

    def test_images_of_another_size_are_refused(self, weights):
        with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\) for the features 'classifier-"):
            ClassifierFeatures(weights[0])(images(2, 3, 16, 16))

    def test_a_file_that_is_missing_is_refused_with_the_command_that_makes_it(self):
        with pytest.raises(FileNotFoundError, match=r"train_classifier\.py FOLDER nowhere\.pt"):
            ClassifierFeatures("nowhere.pt")

    @pytest.mark.parametrize("content", [b"", b"none", None])
    def test_another_file_is_refused(self, content, tmp_path):
        path = tmp_path / "other.pt"
        torch.save({"weights": {}}, path) if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=r"`ImageClassifier\.save` wrote, got .*other\.pt"):
            ClassifierFeatures(path)
