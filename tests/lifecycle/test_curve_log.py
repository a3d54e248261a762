"""Files of curves: rows as they come, none twice after a kill, none lost if the disk is full."""

import csv
import errno
import os

import pytest
from lightning.pytorch.loggers import CSVLogger
from support.comparisons import logs
from support.forks import exit_code
from support.networks import small_mlp
from support.stops import DieAt, StopAt, StoppedError
from support.trainers import quiet_trainer

from lightning_vr import Convergence, DiffusionModule, GradientVariance, TargetVariance, TaylorCV
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.curve_log import CurveLog

pytestmark = [
    pytest.mark.usefixtures("no_pictures_in_module"),
    # what saves is not what resumes
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
]

CURVES = {"removed_variance", "convergence", "gradient_variance", "control_variate"}


def read(path):
    return path.read_text().splitlines()


def written(path, logged_step, *steps):
    log = CurveLog(path, ["value"], logged_step)
    log.trim()
    for step in steps:
        log.add(step, [(step / 10,)])


def test_rows_are_added_to_the_file_as_they_come(tmp_path):
    path = tmp_path / "curve.csv"
    log = CurveLog(path, ["level", "value"], -1)
    log.add(0, [(0.5, 1.0), (1.5, 2.0)])
    assert read(path) == ["step,level,value", "0,0.5,1.0", "0,1.5,2.0"]
    log.add(3, [(0.5, 4.0)])
    log.add(4, [])
    assert read(path)[3:] == ["3,0.5,4.0"]


@pytest.mark.parametrize("logged", [4, 5])
def test_a_resumed_run_drops_the_rows_that_its_checkpoint_does_not_count(tmp_path, logged):
    path = tmp_path / "curve.csv"
    written(path, -1, 2, 4, 6, 8)
    with path.open("a") as file:
        file.write("1")  # a row that a kill has cut off
    written(path, logged, 6, 8, 10)
    assert read(path) == ["step,value", *(f"{step},{step / 10}" for step in (2, 4, 6, 8, 10))]


def test_a_new_run_begins_a_new_file(tmp_path):
    path = tmp_path / "curve.csv"
    written(path, -1, 2, 4)
    written(path, -1)
    assert not path.exists()
    path.write_text("something,else\n4,5\n")
    written(path, 9, 2)
    assert read(path) == ["step,value", "2,0.2"]


def test_a_rank_without_a_file_writes_none(tmp_path):
    CurveLog(None, ["value"], 3).add(0, [(1.0,)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_rows_that_a_full_disk_does_not_take_come_with_the_next(tmp_path, monkeypatch, full_at):
    write = csv.writer

    class Full:
        def __init__(self, file):
            self.file, self.writer = file, write(file)

        def writerow(self, row):
            self.writer.writerow(row)

        def writerows(self, rows):
            self.file.write("half")
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "curve.csv"
    written(path, -1, 1, 9)
    log = CurveLog(path, ["value"], 1)
    for i, step in enumerate((2, 3, 4)):
        monkeypatch.setattr(csv, "writer", Full if i == full_at else write)
        if i == full_at:
            with pytest.raises(OSError, match="No space left"):
                log.add(step, [(0.5,)])
        else:
            log.add(step, [(0.5,)])
    monkeypatch.setattr(csv, "writer", write)
    log.add(5, [(0.5,)])
    assert read(path) == ["step,value", "1,0.1", *(f"{step},0.5" for step in (2, 3, 4, 5))]


class SaveAt(StopAt):
    """Saves a checkpoint and lets the run go on."""

    def __init__(self, count, path):
        super().__init__("on_train_batch_end", count, path)

    def stop(self, *args):
        try:
            super().stop(*args)
        except StoppedError:
            self.count = -1


def fit(folder, *extra, version="", ckpt_path=None, **options):
    """A run of ten steps in one folder, with a log event at every second."""
    module = DiffusionModule(
        small_mlp(), control_variate=TaylorCV(gate="open", bins=2, refit_every_n_steps=3)
    )
    defaults = {
        "logger": CSVLogger(folder, name="", version=version),
        "max_epochs": 2,
        "limit_val_batches": 0,
        "log_every_n_steps": 2,
    }
    trainer = quiet_trainer(
        TargetVariance([4], noise_levels=3, samples=64),
        Convergence(every_n_steps=2, noise_levels=3, samples=16),
        GradientVariance(every_n_steps=2, samples=2, noise_levels=2),
        *extra,
        **(defaults | options),
    )
    data = EightGaussians(8, num_samples=40, num_validation=8)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def curves(folder):
    return {name: read(folder / f"{name}.csv") for name in CURVES}


@pytest.fixture(scope="module")
def folder_of_whole(tmp_path_factory):
    """The folder of a run that is not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder_of_whole):
    return curves(folder_of_whole)


@pytest.fixture(scope="module")
def metrics(folder_of_whole):
    return read(folder_of_whole / "metrics.csv")


@pytest.mark.parametrize("batch", [3, 4, 7])
def test_a_run_that_is_killed_and_resumed_in_its_folder_leaves_the_files_of_one_that_is_not(
    tmp_path, whole, metrics, batch
):
    path = tmp_path / "stopped.ckpt"

    def killed():
        # goes on for two steps that are lost
        fit(tmp_path, SaveAt(batch, path), DieAt("on_train_batch_end", batch + 2, tmp_path / "x"))

    assert exit_code(killed, seconds=60) == 9
    assert curves(tmp_path) != whole
    fit(tmp_path, ckpt_path=path)
    assert curves(tmp_path) == whole
    assert read(tmp_path / "metrics.csv") == metrics


def test_a_run_that_has_ended_and_goes_on_leaves_the_files_of_one_that_did_not_end(tmp_path, whole):
    trainer = fit(tmp_path, max_epochs=1)
    # 5 is no log event, but the end has rows too
    assert curves(tmp_path)["convergence"][-1].startswith("5,")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fit(tmp_path, ckpt_path=tmp_path / "end.ckpt")
    assert curves(tmp_path) == whole


def test_a_new_run_in_the_folder_of_another_keeps_none_of_its_rows(tmp_path, metrics):
    fit(tmp_path, max_epochs=1)
    with pytest.warns(match="its rows are dropped"):
        fit(tmp_path)
    assert read(tmp_path / "metrics.csv") == metrics


def test_a_test_adds_its_row_to_the_file_of_the_fit(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    rows = len(read(tmp_path / "metrics.csv"))
    again = quiet_trainer(logger=CSVLogger(tmp_path, name="", version=""))
    again.test(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
    assert len(read(tmp_path / "metrics.csv")) == rows + 1


def test_a_second_fit_of_one_trainer_adds_to_the_files_of_the_first(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    first = curves(tmp_path)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, datamodule=trainer.datamodule)
    second = curves(tmp_path)
    for name, lines in first.items():
        assert second[name][: len(lines)] == lines
        assert len(second[name]) > len(lines)


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CurveLog, "_replace", full)
    with pytest.warns(match="could not be written .*: training goes on") as told:
        trainer = fit(tmp_path)
    assert trainer.global_step == 10
    for name in CURVES:
        assert any(f"{name}.csv could not" in str(warning.message) for warning in told)
    assert not os.path.exists(tmp_path / "convergence.csv")


@pytest.mark.filterwarnings("ignore:GradientVariance has measured nothing")
@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}], ids=str)
def test_without_a_logger_no_file_of_numbers_is_written(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    trainer = fit(tmp_path, default_root_dir=tmp_path, **options)
    assert {"control_variate/reduction", "convergence/excess"} <= trainer.callback_metrics.keys()
    assert not list(tmp_path.rglob("*.csv"))


def test_all_versions_together_have_each_row_once(tmp_path, whole):
    with pytest.raises(StoppedError):
        fit(tmp_path, StopAt("on_train_batch_end", 6, tmp_path / "stop.ckpt"), version=0)
    fit(tmp_path, version=1, ckpt_path=tmp_path / "stop.ckpt")
    fit(tmp_path / "whole", version=0)
    assert logs(tmp_path) == logs(tmp_path / "whole")
