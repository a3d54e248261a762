"""Files and folders are whole or not there, and what a killed process leaves goes."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.forks import exit_code

from lightning_vr.callbacks.pictures import save_picture
from lightning_vr.lifecycle import atomic_files, sharded_checkpoints
from lightning_vr.lifecycle.atomic_files import (
    new_folder,
    remove_abandoned,
    remove_at_once,
    replace_link,
    replacing,
)
from lightning_vr.lifecycle.sharded_checkpoints import load_folder, save_folder

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Let this process have written to no folder yet."""
    monkeypatch.setattr(atomic_files, "_cleaned", set())


def die_while_writing(path):
    def die():
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(die, seconds=60) == -signal.SIGKILL


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path):
    path = tmp_path / "file"
    for text in ("one", "two"):
        with replacing(path, "w") as file:
            file.write(text)
            file.flush()
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    with suppress(KeyError), replacing(path, "w") as file:
        file.write("three")
        raise KeyError
    assert path.read_text() == "two"
    assert not hidden(tmp_path)


def test_a_name_of_the_greatest_length_is_written(tmp_path):
    path = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    with replacing(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_what_a_killed_process_leaves_goes_with_the_next_write_to_its_folder(tmp_path):
    die_while_writing(tmp_path / "epoch=1.ckpt")
    assert len(hidden(tmp_path)) == 1
    with replacing(tmp_path / "epoch=2.ckpt") as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=2.ckpt"]


def test_what_another_process_is_writing_stays(tmp_path):
    with replacing(tmp_path / "file", "w") as file:
        file.write("whole")
        assert exit_code(lambda: remove_abandoned(tmp_path), seconds=60) == 0
        assert len(hidden(tmp_path)) == 1
    assert (tmp_path / "file").read_text() == "whole"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with replacing(tmp_path / "file", "w") as first:
        first.write("first")
        with replacing(tmp_path / "file", "w") as second:
            second.write("second, longer")
        assert (tmp_path / "file").read_text() == "second, longer"
    assert (tmp_path / "file").read_text() == "first"


def test_a_writer_whose_file_was_taken_for_abandoned_before_it_was_locked_takes_another(
    tmp_path, monkeypatch
):
    lock, names = atomic_files.fcntl.flock, []

    def flock(file, operation):
        if not names:
            names.append(file.name)
            os.unlink(file.name)  # between opening and locking
        lock(file, operation)

    monkeypatch.setattr(atomic_files.fcntl, "flock", flock)
    with replacing(tmp_path / "file", "w") as file:
        file.write("whole")
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("shape", [(4, 2), (4, 1, 3, 3)], ids=["points", "images"])
def test_a_picture_that_cannot_be_written_leaves_the_one_before(shape, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_picture(torch.zeros(shape), path)
    before = path.read_bytes()

    def no_room(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        save_picture(torch.ones(shape), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def die_with_a_folder(path, moment):
    """Save a folder, and die while its file is written, or before the last of two renames."""

    def die():
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if moment == "writing":
            sharded_checkpoints._write = kill
        else:
            hidden = atomic_files.hidden_folder(path)
            rename = Path.rename
            Path.rename = lambda own, to: kill() if own == hidden else rename(own, to)
        save_folder({"number": 2}, path)

    assert exit_code(die, seconds=60) == -signal.SIGKILL
    (left, *_) = hidden(path.parent)
    # SLURM restarts from the highest number behind "ckpt_" in a name
    assert "ckpt" not in left


@pytest.mark.parametrize("cleaning", ["the next save", "the next run"])
def test_what_a_killed_process_leaves_of_a_folder_goes_with(cleaning, tmp_path):
    path = tmp_path / "hpc_ckpt_1.ckpt"
    save_folder({"number": 1}, path)
    die_with_a_folder(path, "writing")
    assert load_folder(path) == {"number": 1}
    if cleaning == "the next save":
        save_folder({"number": 3}, tmp_path / "other.ckpt")
    else:
        remove_abandoned(tmp_path)
    assert not hidden(tmp_path)
    assert load_folder(path) == {"number": 1}


def test_a_folder_is_there_again_if_a_process_was_killed_while_it_was_replaced(tmp_path):
    path = tmp_path / "last.ckpt"
    save_folder({"number": 1}, path)
    die_with_a_folder(path, "renaming")
    assert not path.exists()
    remove_abandoned(tmp_path)  # a run that starts there keeps it
    assert load_folder(path) == {"number": 1}
    assert path.is_dir()
    assert not hidden(tmp_path)


def test_a_folder_that_a_process_was_killed_in_removing_is_gone(tmp_path):
    path = tmp_path / "old.ckpt"
    save_folder({"number": 1}, path)

    def die():
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        atomic_files.shutil.rmtree = lambda path, **_: Path(path).exists() and kill()
        remove_at_once(path)

    assert exit_code(die, seconds=60) == -signal.SIGKILL
    assert not path.exists()
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path):
    link, targets = tmp_path / "last.ckpt", [tmp_path / "1.ckpt", tmp_path / "2.ckpt"]
    for number, target in enumerate(targets):
        save_folder({"number": number}, target)
        assert replace_link(link, target)
        assert load_folder(link) == {"number": number}
    save_folder({"number": 2}, link)
    assert [load_folder(each)["number"] for each in (*targets, link)] == [0, 1, 2]
    assert not replace_link(link, targets[0])  # a folder is there
    assert not hidden(tmp_path)


def test_a_folder_without_the_files_of_another_node_takes_no_place(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save_folder({"number": 1}, path)
    monkeypatch.setattr(sharded_checkpoints, "world_size", lambda: 2)
    with pytest.raises(OSError, match=r"rank-1.pt of other nodes .* that all nodes share"):
        save_folder({"number": 2}, path)
    assert load_folder(path) == {"number": 1}
    assert not hidden(tmp_path)


def test_a_folder_that_another_process_is_writing_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    save_folder({"number": 1}, path)
    with new_folder(path):
        path.rename(atomic_files._beside(path, ".old"))  # about to replace it
        assert exit_code(lambda: remove_abandoned(tmp_path), seconds=60) == 0
        assert exit_code(lambda: load_folder(path), seconds=60) == 0
        assert not path.exists()
        assert len(hidden(tmp_path)) == 2
    assert load_folder(path) == {"number": 1}
