"""``--ckpt_path last``: the newest checkpoint, wherever the configured run would write its own."""

import os

import pytest
import torch
from commands import settings, write
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers.logger import Logger

from lightning_vr.cli.checkpoint_path import last_checkpoint
from lightning_vr.lifecycle import atomic_files
from lightning_vr.lifecycle.sharded_checkpoints import save_folder

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_last_is_the_newest_run(run):
    run("fit")
    run("fit", "--model.network.width=8")
    model = settings(run("validate", "--ckpt_path=last", network=[]))["model"]["init_args"]
    assert model["network"]["init_args"]["width"] == 8


def test_a_link_to_what_is_not_there_is_refused_if_it_is_the_newest(run, refused):
    folder = run("fit") / "checkpoints"
    (folder.parent.parent / "version_1/checkpoints").mkdir(parents=True)
    link = folder.parent.parent / "version_1/checkpoints/last.ckpt"
    link.symlink_to(folder / "gone.ckpt")
    tick = (folder / "last.ckpt").stat().st_mtime + 1  # clocks of files are coarse
    os.utime(link, (tick, tick), follow_symlinks=False)
    assert "last.ckpt is a link to" in refused("validate", "--ckpt_path=last")
    os.utime(link, (0, 0), follow_symlinks=False)
    run("validate", "--ckpt_path=last", network=[])


def test_last_finds_a_folder_that_a_killed_process_was_about_to_replace(run):
    path = run("fit") / "checkpoints/last.ckpt"
    whole = torch.load(path, weights_only=True)
    path.unlink()
    save_folder(whole, path)
    path.rename(atomic_files._beside(path, ".old"))
    run("validate", "--ckpt_path=last", network=[])
    assert path.is_dir()


def test_last_looks_where_the_logger_writes(run, refused):
    run("fit")
    error = refused("validate", "--ckpt_path=last", "--trainer.logger.save_dir=elsewhere")
    assert "no checkpoints/last.ckpt in elsewhere" in error


@pytest.mark.parametrize("is_list", [False, True])
def test_last_looks_where_a_checkpoint_callback_writes(is_list, run, folder):
    arguments = {"save_last": True, "dirpath": "kept"}
    saver = {"class_path": "ModelCheckpoint", "init_args": arguments}
    short = {"samples": 64, "noise_levels": 2}
    measured = {"class_path": "TargetVariance", "init_args": short}
    others = [measured, {"class_path": "LearningRateMonitor"}]
    config = write(
        folder / "kept.yaml", trainer={"callbacks": [*others, saver] if is_list else saver}
    )
    assert not (run("fit", f"--config={config}") / "checkpoints").exists()

    run("validate", "--ckpt_path=last", f"--config={config}", network=[])
    with pytest.raises(SystemExit):
        run("validate", "--ckpt_path=last", network=[])


def test_without_a_last_checkpoint_all_folders_are_named(refused, folder):
    saver = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    config = write(folder / "kept.yaml", trainer={"callbacks": saver})
    error = refused("validate", "--ckpt_path=last", f"--config={config}")
    assert "no checkpoints/last.ckpt in runs and no last.ckpt in kept:" in error


class Remote(Logger):
    """A logger that keeps nothing on this machine."""

    name, version = "remote", "first"

    def log_metrics(self, *args, **kwargs):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def configured(*flags):
    """What the command line makes of flags for the trainer."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    return parser.parse_args([f"--trainer.{flag}" for flag in flags]).trainer


@pytest.mark.parametrize(
    ("flags", "runs"),
    [
        (["logger=WandbLogger", "logger.project=ours", "logger.name=mine"], "ours"),
        (["logger=WandbLogger", "logger.save_dir=logs", "logger.name=mine"], "logs/lightning_logs"),
        (["logger=WandbLogger", "logger.save_dir=null", "default_root_dir=root"], "root/of_all"),
        (["logger=CSVLogger", "logger.save_dir=logs", "logger.name=mine"], "logs/mine"),
        ([f"logger={__name__}.Remote", "default_root_dir=root"], "root/remote"),
        (["logger=[]", "default_root_dir=root"], "root"),
        (["logger=null", "default_root_dir=~/root"], "home/root"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_last_looks_where_lightning_makes_the_folders_of_runs(flags, runs, folder, monkeypatch):
    if "of_all" in runs:
        monkeypatch.setenv("WANDB_PROJECT", "of_all")
    monkeypatch.setenv("HOME", str(folder / "home"))
    path = folder / runs / "first/checkpoints/last.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert last_checkpoint(configured(*flags)).resolve() == path
