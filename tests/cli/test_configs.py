"""Every shipped configuration runs, and its run writes to one folder only."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from lightning_vr.callbacks import Convergence, TargetVariance
from lightning_vr.cli import main
from lightning_vr.metrics import ImageClassifier
from tests.support.images import random_picture

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    # two steps are too few
    pytest.mark.filterwarnings("ignore:GradientVariance has measured nothing"),
]

CONFIGS = [
    # pictures of each kind are drawn once
    pytest.param(path, marks=pytest.mark.pictures if path.stem == "digits_stf" else ())
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
]
BASE = Path(__file__).parents[2] / "configs/eight_gaussians.yaml"
OVERLAYS = {"wandb"}
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.sampler.solver=Euler",
    "--model.sampler.steps=2",
]
WRITTEN = {
    "metrics.csv",
    "config.yaml",
    "target_variance.csv",
    "target_variance.png",
    "convergence.csv",
    "convergence.png",
    "checkpoints/last.ckpt",
}
SMALL_UNET = [  # as many levels as the configuration has
    "--model.network.init_args.sample_size=16",
    "--data.size=16",
    "--model.network.init_args.layers_per_block=1",
    "--model.network.init_args.norm_num_groups=4",
    "--model.target.init_args.references=64",
    "--data.batch_size=4",
    "--data.num_workers=0",
]
WIDTHS = {"cifar10": [4] * 4, "cifar10_edm": [4] * 3}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few noise levels and samples where the configurations leave them to the callback."""
    shorter = {
        TargetVariance: {"noise_levels": 5, "samples": 64},
        Convergence: {"noise_levels": 2, "samples": 16},
    }
    for kind, short in shorter.items():
        given = inspect.signature(kind).parameters.values()
        defaults = tuple(short.get(each.name, each.default) for each in given)
        monkeypatch.setattr(kind.__init__, "__defaults__", defaults)


@pytest.fixture
def files(config, folder):
    """The configuration with fewer samples; for CIFAR-10 with images and a classifier."""
    if config.stem in WIDTHS:
        (folder / "cifar10/train").mkdir(parents=True)
        for i in range(80):
            random_picture(i, 16, 16).save(folder / f"cifar10/train/{i}.png")
        ImageClassifier(3, 16, num_classes=10).save(folder / "cifar10/classifier.pt")
    given = [BASE, config] if config.stem in OVERLAYS else [config]
    return [fewer_samples(file, folder) for file in given]


def fewer_samples(file, folder):
    """A copy of a configuration that evaluates few samples."""
    # a distance needs more samples than features
    text = re.sub(r" samples: \d{4,}", " samples: 130", file.read_text())
    (folder / file.name).write_text(re.sub(r" samples: (64|100)\b", " samples: 4", text))
    return folder / file.name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_runs_and_leaves_all_in_one_folder(files, folder, capsys):
    beside = {path.name for path in folder.glob("*")} | {"runs"}

    main(["fit", *(f"--config={file}" for file in files), *tiny(files[0])])

    (run,) = folder.glob(f"runs/{files[0].stem}/version_*")
    written = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert written >= WRITTEN
    assert ("samples/step_00000002.png" in written) == ("SampleGrid" in files[0].read_text())
    assert "V_STF" in capsys.readouterr().out

    assert {path.name for path in folder.glob("*")} <= beside
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert "val/loss" in header
    assert "frechet_distance/" in header


def test_a_configuration_of_a_run_serves_the_other_subcommands(folder):
    flags = [f"--config={fewer_samples(BASE, folder)}", *tiny(BASE)]
    main(["fit", *flags])

    for version, stage in enumerate(["validate", "test", "predict"], start=1):
        main([stage, *flags, "--ckpt_path=runs/eight_gaussians/version_0/checkpoints/last.ckpt"])
        run = folder / f"runs/eight_gaussians/version_{version}"
        assert (run / "config.yaml").exists()
        assert (run / "samples.npz").exists() == (stage == "predict")
        assert any(run.glob("samples/*.png")) == (stage != "predict")


def tiny(config):
    """Flags that make a run short; synthetic data comes in any number."""
    if config.stem in WIDTHS:
        widths = f"--model.network.init_args.block_out_channels={WIDTHS[config.stem]}"
        return [*TINY, *SMALL_UNET, widths]
    if "digits" in config.stem:
        return [*TINY, "--model.network.init_args.block_out_channels=[8,16]"]
    is_synthetic = yaml.safe_load(config.read_text())["data"]["class_path"] != "Digits"
    return [*TINY, "--data.num_samples=1100"] if is_synthetic else TINY
