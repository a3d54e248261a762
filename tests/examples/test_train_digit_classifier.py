"""The weights in the package do what the training script says."""

import runpy
from pathlib import Path

import pytest
import torch

from lightning_vr.data.digits import digits
from lightning_vr.metrics import DigitFeatures
from lightning_vr.metrics.features import DIGIT_WEIGHTS, DigitClassifier

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "train_digit_classifier.py"


@pytest.fixture(scope="module")
def script():
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("only_held_out", "accuracy", "confident"), [(True, 0.978, 0.928), (False, 0.991, 0.936)]
)
def test_the_weights_are_as_accurate_and_as_confident_as_stated(
    script, only_held_out, accuracy, confident
):
    images, labels = digits()
    chosen = script["held_out_digits"](len(images))
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


def test_the_script_evaluates_as_the_features_do(script):
    images, labels = digits()
    classifier = DigitClassifier().eval()
    classifier.load_state_dict(torch.load(DIGIT_WEIGHTS, weights_only=True))
    accuracy, confident = script["evaluate"](classifier, images, labels)
    probabilities = DigitFeatures().probabilities(images)
    assert accuracy == (probabilities.argmax(dim=1) == labels).float().mean().item()
    assert confident == (probabilities.amax(dim=1) > 0.9).float().mean().item()


def test_the_script_writes_what_the_features_load(script, tmp_path, monkeypatch, capsys):
    written = tmp_path / "weights.pt"
    threads = torch.get_num_threads()
    settings = script["main"].__globals__
    monkeypatch.setitem(settings, "DIGIT_WEIGHTS", written)
    monkeypatch.setitem(settings, "EPOCHS", 1)
    with torch.random.fork_rng():
        script["main"]()
    torch.set_num_threads(threads)

    assert "held out: accuracy 0." in capsys.readouterr().out
    shipped = torch.load(DIGIT_WEIGHTS, weights_only=True)
    found = torch.load(written, weights_only=True)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in shipped.items()
    }
