"""Folders of sharded checkpoints that are damaged, or whose files are not of one folder."""

import shutil

import pytest
import torch
from torch import nn

from lightning_vr.lifecycle.ema import Averages
from lightning_vr.lifecycle.sharded_checkpoints import load_folder, save_folder

SHARDED = "lightning_vr.sharded"
WEIGHT = torch.arange(6.0).reshape(3, 2)


def note(**changes):
    return {SHARDED: 0, "shape": [3, 2]} | changes


@pytest.fixture
def folder(tmp_path):
    """Return a folder whose file of a rank holds a weight."""
    path = tmp_path / "good.ckpt"
    save_folder({"weight": note()}, path)
    change(path, "rank-0.pt", rows=[WEIGHT])
    return path


def change(folder, file, **values):
    held = torch.load(folder / file, weights_only=True, mmap=False)
    torch.save(held | values, folder / file)


def test_rows_come_back_as_they_were(folder):
    assert torch.equal(load_folder(folder)["weight"], WEIGHT)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("meta.pt", {"ranks": 10**15}, "lacks rank-1.pt"),
        ("meta.pt", {"ranks": "1"}, r"meta.pt does not \(TypeError\)"),
        ("meta.pt", {"checkpoint": {"weight": note(**{SHARDED: 7})}}, "does not fit together"),
        ("meta.pt", {"checkpoint": {"weight": note(shape=[4, 2])}}, "does not fit together"),
        ("meta.pt", {"checkpoint": {"weight": {SHARDED: 0}}}, "does not fit together"),
        ("rank-0.pt", {"rows": []}, "does not fit together"),
        ("rank-0.pt", {"rows": {}}, r"rank-0.pt does not \(TypeError\)"),
        ("rank-0.pt", {"rank": 1}, "rank-0.pt is of another, or of another rank"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, file, values, message):
    change(folder, file, **values)
    with pytest.raises(ValueError, match=message) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)


def test_a_list_that_holds_itself_is_refused(folder):
    endless = {}
    endless["again"] = endless
    change(folder, "meta.pt", checkpoint=endless)
    with pytest.raises(ValueError, match="does not fit together"):
        load_folder(folder)


def test_files_of_two_folders_are_no_checkpoint(folder, tmp_path):
    save_folder({"weight": note()}, tmp_path / "other.ckpt")
    shutil.copy(folder / "rank-0.pt", tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="must be one checkpoint, but"):
        load_folder(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    "changes", [{"n_averaged": None}, {"weights": "abc"}, {"weights": []}, {"weights": [{}]}]
)
def test_damaged_averages_are_refused(changes):
    averages, module = Averages([0.9], [], warmup=False), nn.Linear(1, 1)
    averages.update_parameters(module)
    with pytest.raises(ValueError, match=r"`averaging_state\.\w+` in the checkpoint x must be"):
        averages.load(averages.state() | changes, module, "x")
