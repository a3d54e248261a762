"""Schedules and callbacks that monitor a number, which must be one that somebody logs."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from support.networks import small_mlp
from support.points import Points, normal_points
from support.trainers import quiet_trainer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from lightning_vr import DiffusionModule, FrechetDistance, TargetVariance


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loader(count=32, batch_size=8):
    return DataLoader(Points(normal_points(count, "monitors")), batch_size)


class Watch(Callback):
    """Notes after which batches of a fit validation runs end."""

    def __init__(self):
        self.runs = 0

    def on_validation_end(self, trainer, pl_module):
        self.runs += not trainer.sanity_checking


def plateau(monitor, **options):
    # a threshold that no loss reaches: each look at it is a bad one
    return lambda optimizer: ReduceLROnPlateau(
        optimizer, monitor, threshold=1e9, threshold_mode="abs", factor=0.5, patience=0, **options
    )


def fit(schedule=None, callbacks=(), module=DiffusionModule, train=None, val=None, **options):
    made = module(
        small_mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0e-3), lr_scheduler=schedule
    )
    trainer = quiet_trainer(callbacks=callbacks, **({"max_steps": 6} | options))
    # an empty loader is false
    train, val = loader() if train is None else train, loader(16) if val is None else val
    trainer.fit(made, train, val)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"check_val_every_n_epoch": 1},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},  # epochs have 4 batches
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
        {"val_check_interval": 2},
        {"accumulate_grad_batches": 2, "val_check_interval": 1, "max_steps": 3},
    ],
    ids=str,
)
def test_a_schedule_that_monitors_validation_steps_once_for_each_run(options):
    watch = Watch()
    trainer = fit(plateau("val/loss"), [watch], **options)
    assert watch.runs >= 1
    # the first look sets the best value
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3 * 0.5 ** (watch.runs - 1))
    assert trainer.lr_scheduler_configs[0].monitor == "val/loss"


def test_a_schedule_that_monitors_training_steps_after_each_step():
    trainer = fit(plateau("train/loss"))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**5)


def test_a_schedule_may_monitor_what_a_callback_measures():
    name = "frechet_distance/identity_n20"
    trainer = fit(plateau(name), [FrechetDistance(samples=20)], val_check_interval=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**2)


def test_a_checkpoint_of_a_validation_run_holds_the_schedule_after_its_look(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{step}")
    fit(plateau("val/loss"), [save], enable_checkpointing=True, max_steps=4)
    (file,) = tmp_path.glob("*.ckpt")
    (state,) = torch.load(file, weights_only=False)["lr_schedulers"]
    assert state["last_epoch"] == 1


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("val/los", patience=9),
        ModelCheckpoint(monitor="loss"),
        ModelCheckpoint(monitor="val_loss", every_n_train_steps=1000),
        EarlyStopping("target_variance/total", patience=9),
        EarlyStopping("frechet_distance/identity_n20", patience=9),
    ],
    ids=lambda callback: f"{type(callback).__name__} {callback.monitor}",
)
def test_a_monitor_that_nothing_logs_is_refused_before_the_first_batch(callback):
    class First(DiffusionModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError("a batch was trained on")

    with pytest.raises(ValueError, match=r"`monitor` of \w+ must be a number that this run logs"):
        fit(callbacks=[callback], module=First, enable_checkpointing=True)


def test_a_validation_loss_is_no_monitor_where_nothing_is_validated():
    with pytest.raises(ValueError, match="or a `limit_val_batches` above 0"):
        fit(callbacks=[EarlyStopping("val/loss")], limit_val_batches=0)


@pytest.mark.parametrize(
    "callbacks",
    [
        [EarlyStopping("val/loss", patience=9)],
        [EarlyStopping("train/loss", patience=9)],
        [ModelCheckpoint(monitor="step", mode="max")],
        [ModelCheckpoint(monitor="frechet_distance/identity_n20"), FrechetDistance(samples=20)],
    ],
    ids=lambda callbacks: str(callbacks[0].monitor),
)
def test_a_monitor_that_is_logged_is_accepted(callbacks, tmp_path):
    saves = isinstance(callbacks[0], ModelCheckpoint)
    fit(callbacks=callbacks, enable_checkpointing=saves, default_root_dir=tmp_path)


class Own(DiffusionModule):
    """A module that logs a number of its own."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("own", 1.0)


class Logging(Callback):
    """A callback that does."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("own", 1.0)


@pytest.mark.parametrize(("module", "more"), [(Own, []), (DiffusionModule, [Logging()])])
def test_numbers_of_ones_own_can_be_monitored(module, more):
    fit(callbacks=[*more, EarlyStopping("own", patience=9)], module=module)


def test_the_callbacks_of_this_package_say_what_they_log():
    assert FrechetDistance(samples=20).logged == ("frechet_distance/",)
    assert "target_variance/" in TargetVariance.logged
    assert isinstance(LearningRateMonitor(), Callback)


def one_cycle(steps):
    return lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=steps)


def test_a_cycle_that_ends_before_the_run_is_refused_and_one_of_its_length_is_not():
    with pytest.raises(ValueError, match=r"total_steps` of OneCycleLR must be at least 6.*got 5"):
        fit(one_cycle(5))
    assert fit(one_cycle(6)).global_step == 6


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_training_loader_without_a_batch_is_refused():
    with pytest.raises(MisconfigurationException, match="got an empty loader"):
        fit(train=DataLoader(Points(normal_points(4, "few")), 8, drop_last=True))


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_validation_loader_without_a_batch_is_refused():
    with pytest.raises(MisconfigurationException, match="`val_dataloaders` must have"):
        fit(val=DataLoader(Points(normal_points(4, "few")), 8, drop_last=True))


def test_a_fit_without_training_batches_is_refused():
    with pytest.raises(MisconfigurationException, match="`limit_train_batches` must not be 0"):
        fit(limit_train_batches=0)


def test_a_training_set_smaller_than_the_features_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"must have more than 2 samples.*got 2"):
        fit(callbacks=[FrechetDistance(samples=20)], train=loader(2, batch_size=2))
