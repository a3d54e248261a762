"""Command lines run in this process, in an empty folder."""

from functools import partial
from pathlib import Path

import pytest
import yaml

from lightning_vr.cli import main

POINTS = ["--data", "EightGaussians", "--data.num_samples", "512", "--data.num_validation", "64"]
NETWORK = ["--model.network", "MLP", "--model.network.width", "16", "--model.network.depth", "1"]
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
SAVE_LAST = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The empty folder that the command line runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder):
    """Run a subcommand on points with a small network; return the new run's folder."""
    return partial(run_in, folder)


@pytest.fixture
def refused(run, capsys):
    """Return the one line on stderr with which a subcommand is refused."""

    def go(*args, **kwargs):
        with pytest.raises(SystemExit) as exit_:
            run(*args, **kwargs)
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:]
        return errors[0]

    return go


def run_in(folder, command, *flags, network=NETWORK, data=POINTS, short=SHORT):
    before = set(folder.glob("runs/version_*"))
    callbacks = ["--config", str(write(folder / "last.yaml", trainer={"callbacks": SAVE_LAST}))]
    main([command, *callbacks, *network, *data, *short, *flags])
    (new,) = set(folder.glob("runs/version_*")) - before
    return new


def write(path: Path, **settings) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path
