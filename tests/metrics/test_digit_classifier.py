"""The weights that ship do what the page of the training script says."""

import pytest
import torch

from lightning_vr.data.digits import digits
from lightning_vr.metrics import DigitFeatures, digit_classifier
from lightning_vr.metrics.features import DIGIT_WEIGHTS, DigitClassifier


@pytest.mark.parametrize(
    ("only_held_out", "accuracy", "confident"), [(True, 0.978, 0.928), (False, 0.991, 0.936)]
)
def test_the_shipped_weights_are_as_right_and_as_sure_as_stated(only_held_out, accuracy, confident):
    images, labels = digits()
    chosen = digit_classifier.held_out_digits(len(images))
    chosen = chosen if only_held_out else torch.ones_like(chosen)

    probabilities = DigitFeatures().probabilities(images[chosen])
    confidence, guess = probabilities.max(dim=1)

    assert (guess == labels[chosen]).float().mean().item() == pytest.approx(accuracy, abs=2e-3)
    assert (confidence > 0.9).float().mean().item() == pytest.approx(confident, abs=2e-3)


def test_uniform_noise_is_rarely_taken_for_a_digit():
    noise = torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    confidence = DigitFeatures().probabilities(noise).amax(dim=1)
    assert (confidence > 0.9).float().mean() < 0.2


def test_the_weights_stay_a_small_file():
    assert DIGIT_WEIGHTS.stat().st_size < 200_000


def test_the_training_evaluates_as_the_features_do():
    images, labels = digits()
    classifier = DigitClassifier().eval()
    classifier.load_state_dict(torch.load(DIGIT_WEIGHTS, weights_only=True))
    accuracy, confident = digit_classifier.evaluate(classifier, images, labels)
    probabilities = DigitFeatures().probabilities(images)
    assert accuracy == (probabilities.argmax(dim=1) == labels).float().mean().item()
    assert confident == (probabilities.amax(dim=1) > 0.9).float().mean().item()


def test_the_script_writes_what_the_features_load(tmp_path, monkeypatch, capsys):
    written = tmp_path / "weights.pt"
    threads = torch.get_num_threads()
    monkeypatch.setattr(digit_classifier, "DIGIT_WEIGHTS", written)
    monkeypatch.setattr(digit_classifier, "EPOCHS", 1)
    with torch.random.fork_rng():
        digit_classifier.main()
    torch.set_num_threads(threads)

    assert "held out: accuracy 0." in capsys.readouterr().out
    shipped = torch.load(DIGIT_WEIGHTS, weights_only=True)
    found = torch.load(written, weights_only=True)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in shipped.items()
    }
