"""A run writes its files to its own folder and replaces no file of another run."""

from pathlib import Path

import pytest
import yaml
from commands import NETWORK, POINTS, SHORT, write
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_vr.cli import VRCLI, main
from lightning_vr.lifecycle.loggers import run_folder

FLAGS = [*NETWORK, *POINTS, *SHORT]


class Shared(Logger):
    """A logger with one folder for all runs, as most loggers have."""

    name = "ours"

    def __init__(self, save_dir: str | None = None, version: int | str = "first"):
        super().__init__()
        self._save_dir, self._version = save_dir, version

    @property
    def save_dir(self):
        return self._save_dir

    @property
    def version(self):
        return self._version

    def log_metrics(self, *args, **kwargs):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def trainer(logger):
    return Trainer(
        logger=logger,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def sigma_data(path):
    return yaml.safe_load(path.read_text())["model"]["init_args"]["sigma_data"]


def test_the_users_own_configuration_is_left_as_it_is(folder):
    config = write(folder / "config.yaml", model={"init_args": {"sigma_data": 0.25}})
    written = config.read_text()
    flags = ["--config=config.yaml", *FLAGS, "--trainer.logger=false"]

    main(["fit", *flags])
    with pytest.warns(UserWarning, match="exists and is not empty"):
        main(["fit", *flags, "--model.sigma_data=0.75"])

    assert config.read_text() == written
    assert sigma_data(folder / "config_1.yaml") == 0.25
    assert sigma_data(folder / "config_2.yaml") == 0.75


def test_a_link_to_what_is_not_there_is_not_written_through(folder):
    (folder / "config.yaml").symlink_to("gone.yaml")
    main(["fit", *FLAGS, "--trainer.logger=false"])
    assert not (folder / "gone.yaml").exists()
    assert (folder / "config_1.yaml").exists()


@pytest.mark.usefixtures("no_pictures")
def test_runs_whose_logger_has_one_folder_for_all_share_no_file(folder):
    grid = {"class_path": "TargetVariance", "init_args": {"samples": 64, "noise_levels": 3}}
    file = write(folder / "callbacks.yaml", trainer={"callbacks": [grid]})
    shared = [f"--trainer.logger={__name__}.Shared", "--trainer.logger.save_dir=logs"]
    for version in ("first", "second"):
        own = [*shared, f"--trainer.logger.version={version}"]
        main(["fit", f"--config={file}", *FLAGS, *own])

    for version in ("first", "second"):
        written = {path.name for path in (folder / "logs/ours" / version).iterdir()}
        assert written >= {"config.yaml", "target_variance.csv", "checkpoints"}
    assert {path.name for path in folder.glob("logs/*")} == {"ours"}


@pytest.mark.parametrize(
    "logger",
    [
        lambda: WandbLogger(name="mine", project="ours", version="first", save_dir="logs"),
        lambda: WandbLogger(name="mine", version="first", save_dir=None),
        lambda: Shared(version=3),
        lambda: CSVLogger("logs"),
        lambda: False,
    ],
    ids=["wandb", "wandb, no folder", "number", "csv", "none"],
)
def test_the_folder_of_a_run_is_where_its_checkpoints_lie(logger):
    ours = trainer(logger())
    checkpoints = ModelCheckpoint()._ModelCheckpoint__resolve_ckpt_dir(ours)
    assert run_folder(ours) == Path(checkpoints).parent


def test_all_ranks_take_the_folder_of_rank_zero(folder, monkeypatch):
    theirs = trainer(Shared("logs", "a version of a rank that has no experiment"))
    first = Path("logs/ours/first")
    monkeypatch.setattr(theirs.strategy, "broadcast", lambda own: first)
    assert run_folder(theirs) == first
    assert {path.name for path in folder.glob("logs/ours/*")} == {"first"}


def savers(**settings):
    cli = VRCLI(args=[*FLAGS, "--trainer.logger=false"], run=False, **settings)
    return [each for each in cli.trainer.callbacks if isinstance(each, SaveConfigCallback)]


def test_how_settings_are_saved_may_be_chosen(folder):
    class Own(SaveConfigCallback):
        pass

    assert [type(each) for each in savers(save_config_callback=Own)] == [Own]
    assert not savers(save_config_callback=None)


def test_overwriting_may_be_asked_for(folder):
    (folder / "config.yaml").write_text("theirs: 1")
    args = ["fit", *FLAGS, "--trainer.logger=false"]
    VRCLI(args=args, save_config_kwargs={"overwrite": True})
    assert "theirs" not in (folder / "config.yaml").read_text()
    assert not (folder / "config_1.yaml").exists()
