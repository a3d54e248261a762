"""Networks on the command line: how they are called, and networks from a folder."""

from pathlib import Path

import pytest
import torch
import yaml
from commands import POINTS, write
from support.networks import small_unet

from lightning_vr import DiffusionModule
from lightning_vr.cli import main

DIGITS = ["--data=Digits", "--data.batch_size=4"]
FOLDER = {"class_path": "Pretrained", "init_args": {"path": "saved", "subfolder": "unet"}}


@pytest.fixture
def saved(folder):
    """A folder of diffusers with a network for digits."""
    network = small_unet()
    network.save_pretrained(folder / "saved/unet")
    return network


def printed(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *args, "--print_config"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def model(folder, network, **options):
    settings = {"class_path": "DiffusionModule", "init_args": {"network": network, **options}}
    return ["--config", str(write(folder / "model.yaml", model=settings))]


def test_printed_settings_end_with_the_call_of_the_network_and_parse_to_themselves(capsys, folder):
    network = {"class_path": "diffusers.DiTTransformer2DModel", "init_args": {"num_layers": 1}}
    first = printed(capsys, *model(folder, network, num_classes=1000), *DIGITS)
    assert first.splitlines()[-1] == (
        "# network: DiTTransformer2DModel is called as (hidden_states=x, timestep=t, "
        "class_labels=labels)"
    )
    (folder / "printed.yaml").write_text(first)
    assert printed(capsys, "--config=printed.yaml") == first
    assert yaml.safe_load(first)["model"]["init_args"]["num_classes"] == 1000


def test_the_call_is_printed_also_for_a_folder_a_dtype_and_a_predict_of_ones_own(
    capsys, folder, saved, monkeypatch
):
    cast = {"class_path": "InDtype", "init_args": {"network": FOLDER, "dtype": "bfloat16"}}
    for network in (FOLDER, cast):
        last = printed(capsys, *model(folder, network), *DIGITS).splitlines()[-1]
        assert last == "# network: UNet2DModel is called as (sample=x, timestep=t)"
    (folder / "own_call.py").write_text(
        "from lightning_vr import DiffusionModule\n"
        "class Mine(DiffusionModule):\n"
        "    def predict(self, x, noised):\n"
        "        return self.network(x)\n"
    )
    monkeypatch.syspath_prepend(folder)
    settings = {
        "class_path": "own_call.Mine",
        "init_args": {"network": {"class_path": "ResidualMLP"}},
    }
    file = str(write(folder / "mine.yaml", model=settings))
    last = printed(capsys, "--config", file, *POINTS).splitlines()[-1]
    assert last == "# network: called by Mine.predict"


def test_a_run_from_a_folder_goes_on_without_it(run, folder, saved):
    network = {**FOLDER, "init_args": {**FOLDER["init_args"], "dtype": "bfloat16"}}
    first = run("fit", *model(folder, network), network=[], data=DIGITS)
    path = next(first.glob("checkpoints/last.ckpt"))
    (folder / "saved").rename(folder / "moved")

    checkpoint = torch.load(path, weights_only=True)
    assert "Pretrained" not in str(checkpoint["hyper_parameters"])
    module = DiffusionModule.load_from_checkpoint(path)
    assert type(module.network) is type(saved)
    assert module.network.dtype == torch.bfloat16
    weights = {f"network.{name}" for name in saved.state_dict()}
    assert {name for name in checkpoint["state_dict"] if name.startswith("network.")} == weights

    again = run("fit", f"--ckpt_path={path}", "--trainer.max_steps=4", network=[], data=DIGITS)
    assert (again / "checkpoints/last.ckpt").is_file()


def test_a_folder_without_a_network_is_one_line(refused, folder):
    line = refused("fit", *model(folder, FOLDER), network=[], data=DIGITS)
    assert "`path` must be a folder that diffusers wrote, but there is no folder saved" in line


def test_a_checkpoint_that_names_a_folder_opens_none(run, refused, folder, saved, monkeypatch):
    first = run("fit", *model(folder, FOLDER), network=[], data=DIGITS)
    path = next(first.glob("checkpoints/last.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    full = "lightning_vr.process.diffusers_network.Pretrained"
    hostile = {"class_path": full, "init_args": {"path": str(folder / "saved/unet")}}
    arguments = {"network": hostile, "dtype": "bfloat16"}
    cast = {"class_path": "lightning_vr.process.network_dtype.InDtype", "init_args": arguments}

    def fail(*_):
        raise AssertionError("a folder was opened")

    monkeypatch.setattr("lightning_vr.process.diffusers_network.network_folder", fail)
    flags = ["--ckpt_path=hostile.ckpt", "--num_samples=1"]
    for network in (hostile, full, "Pretrained", cast):
        checkpoint["hyper_parameters"]["network"] = network
        torch.save(checkpoint, "hostile.ckpt")
        with pytest.raises(ValueError, match=r"Pretrained, which is none: do not use a checkpoint"):
            DiffusionModule.load_from_checkpoint(Path("hostile.ckpt"))
        assert "Pretrained, which is none" in refused("predict", *flags, network=[], data=[])
