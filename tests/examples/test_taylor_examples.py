"""The studies of Taylor control variates run as a reader runs them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from lightning_vr import Clean, TaylorCV
from lightning_vr.core.rng import generator
from lightning_vr.data import EightGaussians
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

STUDY = Path(__file__).parents[2] / "examples/control_variates"


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Runs an example quickly and returns the lines that it prints."""

    def run(name):
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--folder", str(tmp_path)])
        runpy.run_path(str(STUDY / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_pairs_and_control_variates_learn_from_small_batches_sooner(printed, tmp_path):
    lines = printed("taylor_small_batches.py")
    arms = ["plain", "plain, batch 64", "16 pairs", "32 pairs", "order 0", "order 1", "order 2"]
    for arm in [*arms, "order 0, 1 below 0.3", "order 0, gate"]:
        assert sum(line[:22].strip() == arm for line in lines) == 1
    assert (tmp_path / "taylor_small_batches.png").stat().st_size > 10_000

    runs = json.loads((tmp_path / "runs.json").read_text())
    error = {run["arm"]: run["errors"][-1][1] for run in runs}
    assert min(error["plain"], error["plain, batch 64"]) > 0.99
    for arm in ("16 pairs", "32 pairs", "order 0", "order 1", "order 2"):
        assert error[arm] < 0.98


def test_taylor_polynomials_explain_more_at_lower_noise(printed, tmp_path):
    lines = printed("taylor_complexity.py")
    assert sum(line.startswith("s = ") for line in lines) == 2
    assert sum(line.startswith("order") for line in lines) == 6
    assert sum(line.split()[:2] == ["16", "1"] for line in lines) == 2
    assert (tmp_path / "taylor_complexity.png").stat().st_size > 10_000

    found = json.loads((tmp_path / "reductions.json").read_text())
    assert set(found) == {"width 16, depth 1", "width 64, depth 2"}
    for by_level in found.values():
        for method in ("pairs", "order 0", "order 1", "order 2"):
            low, high = (by_level[level]["reductions"][method] for level in ("0.01", "0.3"))
            assert low > 2 * high
        assert by_level["0.01"]["reductions"]["order 2"] > by_level["0.01"]["reductions"]["order 0"]


def test_the_complexity_example_agrees_with_the_library_on_the_noise_component():
    example = runpy.run_path(str(STUDY / "taylor_complexity.py"))
    module = example["trained"](16, 1, 0, 100)
    data = EightGaussians()
    data.setup("fit")
    held_out = data.val_dataloader().dataset
    x0 = torch.stack([held_out[i]["x0"] for i in range(512)])
    level, beta = 0.1, 0.75
    found, _ = example["covariances"](module, x0, level, "test")
    own = torch.full((2,), beta, dtype=torch.float64)
    expected = example["reduction"](found, "order 1", own)

    v = float(module.timesteps.cdf(module.schedule.time(torch.tensor(level).double())))
    measurement = GradientMeasurement(
        DiffusionLoss(module), generator, [0] * len(list(module.parameters()))
    )
    noises = []
    for control in (None, TaylorCV(1, gate="open", coefficient=beta)):
        module.control_variate = control
        measured = measurement.per_sample(Clean(x0), "test", low=v - 1e-3, high=v + 1e-3)
        noises.append(float(measured.noise[0]))
    assert noises[0] == pytest.approx(float(found[0, 0]), rel=0.2)
    assert noises[0] / noises[1] == pytest.approx(expected, rel=0.2)
