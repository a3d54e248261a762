"""The command line builds from a checkpoint, and makes of names, only what it should."""

import os
import sys
from pathlib import Path

import pytest
import torch
from commands import NETWORK, POINTS, SHORT, write
from support.networks import small_mlp
from support.trainers import quiet_trainer

from lightning_vr import DiffusionModule
from lightning_vr.cli import main
from lightning_vr.data import EightGaussians

PACKAGE = """
from pathlib import Path

import torch

Path("imported").touch()


class Descent(torch.optim.SGD):
    pass


def build(parameters):
    Path("ran").touch()
"""
SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
FLAGS = {
    "predict": ["--num_samples=3"],
    "fit": [*POINTS, "--trainer.max_steps=3"],
    "audit": [*POINTS, "--budget=1"],
}
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of one training step."""
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(DiffusionModule(small_mlp()), EightGaussians(num_samples=64, batch_size=16))
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return torch.load(path, weights_only=True)


@pytest.fixture
def changed(good, folder, monkeypatch):
    """Write the checkpoint with another optimizer, beside a package that nobody has imported."""
    (folder / "strange.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder)

    def change(optimizer):
        described = good["hyper_parameters"] | {"optimizer": optimizer}
        torch.save(good | {"hyper_parameters": described}, "changed.ckpt")
        return "--ckpt_path=changed.ckpt"

    yield change
    sys.modules.pop("strange", None)


@pytest.fixture
def stopped(capsys):
    """Return the one line with which the command line refuses."""

    def go(*args):
        with pytest.raises(SystemExit) as exit_:
            main([*args, *QUIET])
        assert exit_.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return go


@pytest.mark.parametrize("command", FLAGS)
@pytest.mark.parametrize(
    "given", [SYSTEM, "os.system", "strange.Descent", "{class_path: os.system}"]
)
def test_no_command_runs_what_a_checkpoint_names(given, command, changed, stopped):
    line = stopped(command, changed(given), *FLAGS[command])
    assert "`optimizer` in the checkpoint changed.ckpt must be" in line
    assert not {"ran", "imported"} & set(os.listdir())


def test_nor_where_the_module_is_configured(changed, stopped):
    line = stopped("fit", changed(SYSTEM), *NETWORK, *FLAGS["fit"])
    assert "`optimizer` in the checkpoint changed.ckpt must be an Optimizer" in line
    main(["predict", changed(SYSTEM), *NETWORK, "--model.network.width=8", *QUIET])
    assert not Path("ran").exists()


def test_a_package_that_is_trusted_may_be_built(changed, stopped):
    path = changed({"class_path": "strange.Descent", "init_args": {"lr": 0.1}})
    assert "--trust strange on the command line" in stopped("predict", path)
    main(["predict", path, *FLAGS["predict"], "--trust", "strange", *QUIET])
    assert Path("imported").exists()
    config = write(Path("trust.yaml"), trust=["strange"])
    main(["predict", path, *FLAGS["predict"], f"--config={config}", *QUIET])


@pytest.mark.parametrize(
    "given",
    [
        SYSTEM,
        "os.system",
        {"class_path": "strange.build"},
        "strange.build",
        {"class_path": "torch.nn.ReLU"},
        "torch.hub.load",
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_an_optimizer_in_a_configuration_must_be_one(name, given, changed, stopped):
    model = {"class_path": "DiffusionModule", "init_args": {"network": "ResidualMLP", name: given}}
    config = write(Path("model.yaml"), model=model)
    assert f"`model.{name}` must be a class" in stopped("fit", f"--config={config}", *POINTS)
    if isinstance(given, str):
        line = stopped("fit", *NETWORK, *POINTS, f"--model.{name}={given}")
        assert f"`model.{name}` must be a class" in line
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", "../../x"),
        ("name", "/tmp/x"),
        ("name", "a/../../x"),
        ("version", "../x"),
        ("version", "/tmp/x"),
        ("version", "../../x"),
    ],
)
def test_a_run_stays_in_the_folder_of_runs(setting, value, stopped):
    line = stopped("fit", *NETWORK, *POINTS, f"--trainer.logger.{setting}={value}")
    assert line.startswith(f"error: `trainer.logger.{setting}` must stay within")
    assert value in line


def test_a_run_may_have_a_folder_in_the_folder_of_runs(folder):
    main(["fit", *NETWORK, *POINTS, *SHORT, "--trainer.logger.name=a/../b"])
    assert (folder / "runs/b").is_dir()
