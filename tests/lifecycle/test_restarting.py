"""What resumes on other data, with other callbacks and other loaders, and what is refused."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from support.comparisons import assert_equal
from support.networks import small_mlp
from support.points import Points, normal_points
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_vr import CARV, DiffusionModule, LearnedProposal, ResumableModule, TaylorCV
from lightning_vr.data import EightGaussians, Moons

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:The dirpath has changed from",
    "ignore:Checkpoint directory",
    "ignore:You defined a `validation_step` but have no",
    "ignore:You passed in a `val_dataloader` but have no",
)


class Line(ResumableModule):
    """A linear map, trained to return its argument."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch["x0"]) - batch["x0"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch["x0"]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Seen(Callback):
    """Notes the samples of each batch that has ended, by epoch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, batch["index"].tolist()))


def gaussians(samples=20, batch_size=4):
    return EightGaussians(batch_size, num_samples=samples, num_validation=4)


def fit(*callbacks, data=None, module=None, ckpt_path=None, **options):
    """Train; return the module and the batches."""
    torch.manual_seed(0 if ckpt_path is None else 1)
    seen, module = Seen(), module or Line()
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(
        seen,
        *callbacks,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **(settings | options),
    )
    data = gaussians() if data is None else data
    kinds = {"datamodule": data} if hasattr(data, "setup") else {"train_dataloaders": data}
    trainer.fit(module, **kinds, ckpt_path=ckpt_path, weights_only=True)
    return module, seen.batches


def stopped(folder, hook, count, **options):
    """Return the checkpoint of a run that was stopped at the n-th call of a hook."""
    path = folder / "stopped.ckpt"
    with pytest.raises(StoppedError):
        fit(StopAt(hook, count, path), **options)
    return path


class Other(EightGaussians):
    """The same data under another name."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: gaussians(samples=24), "must have 20 samples, as the checkpoint .* got 24"),
        (lambda: gaussians(batch_size=2), "`batch_size` must be 4 on 1 processes"),
        (lambda: Moons(4, num_samples=20, num_validation=4), "must be of the class EightGaussians"),
        (lambda: Other(4, num_samples=20, num_validation=4), "got Other"),
        (lambda: DataLoader(Points(normal_points(20, "x")), 4), "got None"),
    ],
)
def test_other_data_are_refused_in_the_middle_of_an_epoch(data, message, tmp_path):
    path = stopped(tmp_path, "on_train_batch_end", 2)
    with pytest.raises(MisconfigurationException, match=message):
        fit(data=data(), ckpt_path=path)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize(
    ("data", "number"),
    [
        (lambda: gaussians(samples=24), 6),
        (lambda: Moons(2, num_samples=20, num_validation=4), 10),
    ],
)
def test_other_data_are_fine_at_the_end_of_an_epoch(data, number, hook, tmp_path):
    path = stopped(tmp_path, hook, 5 if hook == "on_train_batch_end" else 1)
    places = [(epoch, batch) for epoch, batch, _ in fit(data=data(), ckpt_path=path)[1]]
    assert places == [(epoch, batch) for epoch in (1, 2) for batch in range(number)]


def test_a_loader_of_other_data_is_refused_in_the_middle_of_an_epoch(tmp_path):
    loaders = [DataLoader(Points(normal_points(n, "x")), 4) for n in (20, 24)]
    path = stopped(tmp_path, "on_train_batch_end", 2, data=loaders[0])
    with pytest.raises(MisconfigurationException, match=r"\[\[20, 4\]\]\), got \[\[24, 4\]\]"):
        fit(data=loaders[1], ckpt_path=path)


def test_a_limit_below_the_batches_that_are_done_is_refused(tmp_path):
    path = stopped(tmp_path, "on_train_batch_end", 4)
    with pytest.raises(MisconfigurationException, match="must leave 4 batches or more"):
        fit(ckpt_path=path, limit_train_batches=3)


class Once(IterableDataset):
    """Samples that can be iterated over once."""

    def __init__(self):
        self.samples = iter([{"x0": torch.zeros(2), "index": 0}] * 8)

    def __iter__(self):
        return self.samples


@pytest.mark.filterwarnings("ignore:Your `IterableDataset`")
def test_epochs_without_a_batch_are_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match="got none in two epochs in a row"):
        fit(data=DataLoader(Once(), 4), max_epochs=-1, max_steps=100)


def test_windows_of_a_schedule_are_those_of_the_epoch_within_it(tmp_path):
    def schedule():
        return GradientAccumulationScheduler({0: 1, 1: 2})

    expected = fit(schedule())[0].state_dict()
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(StoppedError):
        fit(schedule(), StopAt("on_train_batch_end", 8, path))
    assert_equal(fit(schedule(), ckpt_path=path)[0].state_dict(), expected)


def test_a_checkpoint_that_is_saved_once_an_error_is_handled_holds_its_place(tmp_path):
    class Fail(Callback):
        def on_validation_end(self, trainer, module):
            raise StoppedError

    seen, counted = Seen(), []

    class Count(Callback):
        def on_validation_end(self, trainer, module):
            counted.append(trainer.current_epoch)

    torch.manual_seed(0)
    trainer = quiet_trainer(seen, Fail(), max_epochs=3, num_sanity_val_steps=0)
    with pytest.raises(StoppedError):
        trainer.fit(Line(), gaussians())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    module, batches = fit(Count(), ckpt_path=tmp_path / "saved.ckpt")
    assert len(seen.batches) == 5
    assert [batch[:2] for batch in batches] == [(e, b) for e in (1, 2) for b in range(5)]
    assert counted == [1, 2]
    assert_equal(module.state_dict(), fit()[0].state_dict())


def test_a_checkpoint_of_a_validation_after_training_holds_the_place_of_training(tmp_path):
    torch.manual_seed(0)
    module, data = Line(), gaussians()
    trainer = quiet_trainer(max_epochs=-1, max_steps=7, num_sanity_val_steps=0)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    found, batches = fit(ckpt_path=tmp_path / "saved.ckpt")
    assert [batch[:2] for batch in batches[:4]] == [(1, 2), (1, 3), (1, 4), (2, 0)]
    assert_equal(found.state_dict(), fit()[0].state_dict())


class Plain(LightningModule):
    training_step = Line.training_step
    configure_optimizers = Line.configure_optimizers

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_with_any_module_the_order_goes_on_where_lightning_does(tmp_path):
    batches = fit(module=Plain())[1]
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(saver, module=Plain(), max_epochs=-1, max_steps=7)  # two batches into the second epoch
    found = fit(module=Plain(), ckpt_path=tmp_path / "last.ckpt")[1]
    assert found == batches[10:]
    path = stopped(tmp_path, "on_train_batch_end", 7, module=Plain())
    assert fit(module=Plain(), ckpt_path=path)[1] == batches[7:]


class Fail(Callback):
    """Raises in the n-th batch, once it is learned from and measured."""

    def __init__(self, count):
        self.count = count

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.count -= 1
        if self.count == 0:
            raise StoppedError


SLOTS = {
    "proposal": lambda: {"draws": CARV(2, LearnedProposal(bins=2))},
    "taylor": lambda: {"control_variate": TaylorCV(bins=2, gate="open", refit_every_n_steps=2)},
}


@pytest.mark.parametrize("slots", SLOTS)
def test_what_a_batch_that_failed_has_taught_does_not_count_twice(slots, tmp_path):
    def run(*callbacks, ckpt_path=None):
        module = DiffusionModule(small_mlp(std=0.3), **SLOTS[slots]())
        return fit(*callbacks, module=module, ckpt_path=ckpt_path)[0].state_dict()

    expected = run()
    with pytest.raises(StoppedError):
        run(Fail(7), ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True))
    assert_equal(run(ckpt_path=tmp_path / "last.ckpt"), expected)


class Monitored(Line):
    """Its schedulers wait for numbers of validation runs and of epochs."""

    def __init__(self, interval):
        super().__init__()
        self.interval = interval

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("weight", self.layer.weight.mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0)
        monitor = "weight" if self.interval == "epoch" else "val/loss"
        scheduler = {"scheduler": plateau, "monitor": monitor, "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler | {"strict": False}}


PLATEAUS = [
    *(("step", "on_train_batch_end", count) for count in (4, 5, 8)),
    *(("step", "on_validation_end", count) for count in (1, 2)),
    *(("epoch", "on_train_epoch_end", count) for count in (1, 2)),
    *(("epoch", "on_train_batch_end", count) for count in (4, 5, 8)),
]


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
@pytest.mark.parametrize(("interval", "hook", "count"), PLATEAUS)
def test_schedulers_that_monitor_a_number_step_as_often(interval, hook, count, tmp_path):
    settings = {"check_val_every_n_epoch": None, "val_check_interval": 4}

    def run(*callbacks, ckpt_path=None):
        best = ModelCheckpoint(tmp_path, monitor="val/loss", every_n_train_steps=3, save_top_k=2)
        module = Monitored(interval)
        fit(*callbacks, best, module=module, ckpt_path=ckpt_path, **settings)
        (scheduler,) = module.trainer.lr_scheduler_configs
        return scheduler.scheduler.state_dict(), best.best_model_score, module.state_dict()

    expected, path = run(), tmp_path / "stopped.ckpt"
    with pytest.raises(StoppedError):
        run(StopAt(hook, count, path))
    assert_equal(run(ckpt_path=path), expected)


class Broken(Points):
    """Its sample 7 cannot be read, until it is mended."""

    is_mended = False

    def __getitem__(self, i):
        if i == 7 and not self.is_mended:
            raise StoppedError
        return super().__getitem__(i)


class BrokenGaussians(EightGaussians):
    def build_datasets(self):
        train, validation = super().build_datasets()
        return Broken(train.x), validation


def test_a_sample_that_cannot_be_read_stops_before_its_batch(tmp_path, monkeypatch):
    def run(*callbacks, ckpt_path=None):
        data = BrokenGaussians(4, num_samples=20, num_validation=4)
        return fit(*callbacks, data=data, ckpt_path=ckpt_path)

    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(StoppedError):
        run(saver)
    monkeypatch.setattr(Broken, "is_mended", True)
    (_, expected), (found, batches) = run(), run(ckpt_path=tmp_path / "last.ckpt")
    assert 0 < len(batches) < 15
    assert batches == expected[15 - len(batches) :]
    assert_equal(found.state_dict(), run()[0].state_dict())


class Averaging(Line):
    """It logs a metric of torchmetrics."""

    def __init__(self, persistent):
        super().__init__()
        self.mean = MeanMetric()
        self.mean.persistent(persistent)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


def test_a_metric_whose_sums_no_checkpoint_holds_is_named(tmp_path):
    path = stopped(tmp_path, "on_train_batch_end", 2, module=Averaging(persistent=False))
    with pytest.warns(UserWarning, match="sums of the metrics `mean`"):
        fit(module=Averaging(persistent=False), ckpt_path=path)
    path = stopped(tmp_path, "on_train_batch_end", 2, module=Averaging(persistent=True))
    fit(module=Averaging(persistent=True), ckpt_path=path)
