"""TargetVariance in a run: what it writes, what it leaves alone, and whether its numbers agree."""

import copy
import csv
import functools
import math
import re

import matplotlib
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot
from PIL import Image
from torch.utils.data import DataLoader

from lightning_vr import (
    EDM,
    STF,
    VP,
    Clean,
    DiffusionModule,
    LogUniform,
    ResidualMLP,
)
from lightning_vr.callbacks import target_variance
from lightning_vr.callbacks.target_variance import TargetVariance
from lightning_vr.data import EightGaussians

pytestmark = pytest.mark.usefixtures("no_pictures")

MODULES_OWN = ("epoch", "step", "train/loss", "val/loss")
SETTINGS = {"noise_levels": 6, "samples": 128, "references": [4]}


def module(target=None, num_classes=None, **settings):
    torch.manual_seed(0)
    network = ResidualMLP(width=16, depth=1, num_class_embeds=num_classes and num_classes + 1)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    return DiffusionModule(
        network, target=target, num_classes=num_classes, optimizer=optimizer, **settings
    )


def data(**settings):
    return EightGaussians(
        **({"batch_size": 32, "num_samples": 128, "num_validation": 32} | settings)
    )


def trainer(tmp_path, *callbacks, **settings):
    defaults = {
        "accelerator": "cpu",
        "max_steps": 8,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 3,
        "logger": CSVLogger(tmp_path, name="", version=""),
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def logged(path, prefix):
    """The last value of each metric that begins so."""
    found = {}
    for row in rows(path):
        found |= {k: float(v) for k, v in row.items() if k.startswith(prefix) and v}
    return found


def last_rows(path):
    """The rows of the last step in a file of curves, as numbers."""
    table = [{k: float(v) for k, v in row.items()} for row in rows(path)]
    return [row for row in table if row.pop("step") == max(int(r["step"]) for r in rows(path))]


@pytest.mark.pictures
def test_a_run_leaves_a_picture_a_file_numbers_and_a_table(tmp_path, capsys):
    callback = TargetVariance(**SETTINGS)
    fit = trainer(tmp_path, callback)
    fit.fit(module(STF("batch")), data())

    table = rows(tmp_path / "target_variance.csv")
    assert len(table) == 6
    quantities = ("dsm", "stf_4", "stf_32", "ess_4", "ess_32", "ess_all", "divergence")
    columns = ["noise_level", *(q + e for q in quantities for e in ("", "_error"))]
    assert list(table[0]) == [*columns, "factor_4", "factor_32"]
    assert [float(row["dsm"]) for row in table] == callback.curve.dsm.mean.tolist()
    with Image.open(tmp_path / "target_variance.png") as picture:
        assert min(picture.size) > 400

    # a table of metrics has no columns of it, callbacks can monitor each point
    assert not set(rows(tmp_path / "metrics.csv")[0]) - set(MODULES_OWN)
    monitored = {k: v for k, v in fit.callback_metrics.items() if k.startswith("target_variance/")}
    assert all(re.fullmatch(r"[\w./-]+", name) for name in monitored)
    assert sum("/s" in n and "/removed/" not in n for n in monitored) == 6 * (len(columns) - 1)
    removed = rows(tmp_path / "removed_variance.csv")
    assert {row["step"] for row in removed} == {"3", "6", "8"}
    last = [f"target_variance/removed/s{float(r['noise_level']):.2g}" for r in removed]
    assert {n for n in monitored if "/removed/" in n} == set(last)

    printed = capsys.readouterr().out
    for word in ("noise level", "V_DSM", "V_STF (n = 32)", "factor", "ESS"):
        assert word in printed


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (None, ["V_STF (n = 4)", "not what this"]),
        (STF("all"), ["V_STF (all)", "0 (exact)", "∞"]),
        (STF(9), ["V_STF (n = 9)"]),
        (STF("all", min_noise_level=0.5), ["1 (off)", "0 (exact)"]),
    ],
    ids=["dsm", "all", "number", "switch"],
)
def test_the_table_shows_what_the_module_trains_with(tmp_path, capsys, target, words):
    trainer(tmp_path, TargetVariance(**SETTINGS), max_steps=1).fit(module(target), data())
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed


def test_without_arguments_the_references_are_16_256_and_the_modules_own(tmp_path):
    callback = TargetVariance(noise_levels=3, samples=64)
    trainer(tmp_path, callback, max_steps=1).fit(module(STF("all")), data(num_samples=300))
    assert list(callback.curve.stf) == [16, 256, 300]
    small = TargetVariance(noise_levels=3, samples=64)
    tiny = data(num_samples=8, batch_size=8)
    fit = trainer(tmp_path / "small", small, max_steps=1, log_every_n_steps=1)
    fit.fit(module(), tiny)
    assert list(small.curve.stf) == [8]


@pytest.mark.parametrize("target", [None, STF("batch"), STF(8)], ids=["dsm", "batch", "bank"])
def test_a_run_with_the_callback_ends_in_bitwise_the_same_weights(tmp_path, target):
    ends = []
    for callbacks in ([], [TargetVariance(**SETTINGS)]):
        watched = module(target)
        torch.manual_seed(1)
        trainer(tmp_path / str(len(callbacks)), *callbacks).fit(watched, data())
        assert watched.training
        ends.append({**watched.state_dict(), "random": torch.get_rng_state()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class Spreads(Callback):
    """Mean spread of each step."""

    def __init__(self):
        self.means = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.means.append(pl_module.estimate.target.spread.double().mean())


@pytest.mark.parametrize(
    "settings",
    [
        {"target": STF("batch")},
        {"target": STF(12), "schedule": VP()},
        {"target": STF("batch"), "num_classes": 8, "label_dropout": 0.5},
    ],
    ids=["batch", "bank-vp", "labels-dropped"],
)
def test_what_training_removes_is_v_dsm_less_v_stf(tmp_path, settings):
    # times at one noise level, the last of the grid, so that its bin is a point
    settings = {"schedule": EDM()} | settings
    ends = settings["schedule"].time(torch.tensor([0.995, 1.0], dtype=torch.float64))
    callback = TargetVariance(noise_levels=2, samples=2048)
    spreads = Spreads()
    fit = trainer(tmp_path, callback, spreads, max_steps=100, log_every_n_steps=4)
    fit.fit(module(timesteps=LogUniform(*ends.tolist()), **settings), data())

    curve = callback.curve
    own = 12 if settings["target"].references == 12 else 32
    expected = float(curve.dsm.mean[-1] - curve.stf[own].mean[-1])
    (row,) = last_rows(tmp_path / "removed_variance.csv")
    assert row["noise_level"] == pytest.approx(1, rel=0.01)
    measured = row["removed"]

    step = torch.stack(spreads.means)
    assert measured == pytest.approx(float(step.mean()), rel=1e-4)
    error = math.hypot(
        float(step.std()) / len(step) ** 0.5,
        float(curve.dsm.error[-1]),
        float(curve.stf[own].error[-1]),
    )
    # the bin is 0.5 % wide, and the variance changes less than in proportion to its fourth power
    assert abs(measured - expected) < 4 * error + 0.01 * expected
    assert error < 0.05 * expected


def test_dsm_removes_nothing(tmp_path):
    trainer(tmp_path, TargetVariance(**SETTINGS)).fit(module(), data())
    removed = rows(tmp_path / "removed_variance.csv")
    assert removed
    assert {float(row["removed"]) for row in removed} == {0.0}


@pytest.mark.pictures
def test_a_resumed_run_does_not_measure_again_and_goes_on_summing(tmp_path, monkeypatch):
    first = TargetVariance(**SETTINGS)
    fit = trainer(tmp_path / "first", first, max_steps=-1, max_epochs=2)
    fit.fit(module(STF("batch")), data())
    fit.save_checkpoint(tmp_path / "end.ckpt")

    def refuse(*_, **__):
        raise AssertionError("measured again")

    resumed = TargetVariance(**SETTINGS)
    monkeypatch.setattr(target_variance, "measure_target_variance", refuse)
    again = trainer(tmp_path / "again", resumed, max_steps=-1, max_epochs=4)
    again.fit(module(STF("batch")), data(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(resumed.curve.dsm.mean, first.curve.dsm.mean)
    assert (tmp_path / "again" / "target_variance.png").exists()

    monkeypatch.undo()
    unbroken = TargetVariance(**SETTINGS)
    fit = trainer(tmp_path / "unbroken", unbroken, max_steps=-1, max_epochs=4)
    fit.fit(module(STF("batch")), data())
    # times are drawn by step, whatever the order of the data, so the draws in each bin agree
    removed = [c.state_dict()["removed"]["sums"] for c in (first, resumed, unbroken)]
    assert torch.equal(removed[1][0], removed[2][0])
    assert (removed[1][1] >= removed[0][1]).all()
    assert float(removed[1][0].sum()) > 1.5 * float(removed[0][0].sum())


@pytest.mark.parametrize(("size", "is_told"), [(128, False), (160, True)])
def test_a_resumed_run_on_another_training_set_says_so_and_measures_again(
    size, is_told, tmp_path, caplog
):
    first = trainer(tmp_path / "first", TargetVariance(**SETTINGS), max_steps=-1, max_epochs=1)
    first.fit(module(), data())
    first.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    watch = TargetVariance(**SETTINGS)
    again = trainer(tmp_path / "again", watch, max_steps=-1, max_epochs=2)
    again.fit(module(), data(num_samples=size), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert watch.curve.size == size
    message = f"the checkpoint's curve is of 128 training samples, there are {size} now"
    assert (message in caplog.text) == is_told


def test_a_resumed_run_with_another_target_measures_again(tmp_path):
    fit = trainer(tmp_path / "first", TargetVariance(**SETTINGS))
    fit.fit(module(STF(8)), data())
    fit.save_checkpoint(tmp_path / "end.ckpt")
    resumed = TargetVariance(**SETTINGS)
    again = trainer(tmp_path / "again", resumed, max_steps=16)
    again.fit(module(STF(10)), data(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert list(resumed.curve.stf) == [4, 10]


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_two_ranks_measure_what_one_process_does(tmp_path):
    for devices in (1, 2):
        fit = trainer(
            tmp_path / str(devices),
            TargetVariance(**SETTINGS),
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
        )
        fit.fit(module(STF("batch")), data(batch_size=32 // devices))
    curves = [(tmp_path / d / "target_variance.csv").read_bytes() for d in ("1", "2")]
    assert curves[0] == curves[1]
    assert rows(tmp_path / "2" / "removed_variance.csv")


def test_a_configuration_file_can_name_it():
    parser = ArgumentParser()
    parser.add_subclass_arguments(TargetVariance, "callback")
    settings = {"references": [8], "schedule": {"class_path": "lightning_vr.VP"}}
    settings |= {"clean": "copy.copy"}
    path = "lightning_vr.callbacks.target_variance.TargetVariance"
    config = parser.parse_object({"callback": {"class_path": path, "init_args": settings}})
    callback = parser.instantiate(config).callback
    assert isinstance(callback.schedule, VP)
    assert callback.clean is copy.copy
    assert "clean: copy.copy" in parser.dump(config)


def test_two_instances_keep_states_of_their_own():
    keys = {TargetVariance(references=n).state_key for n in (None, [4], [4, 8])}
    assert len(keys) == 3


class Foreign(LightningModule):
    """A trainer that knows nothing of us."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch, _):
        return self.layer(batch["picture"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Pictures(torch.utils.data.Dataset):
    """Points on a line, sorted by class."""

    def __init__(self, size):
        self.x = torch.linspace(-1, 1, size)[:, None].repeat(1, 2)
        self.label = torch.arange(size) * 3 // size

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"picture": self.x[i], "label": self.label[i]}


@pytest.mark.pictures
def test_it_works_on_a_module_that_knows_nothing_of_it(tmp_path, capsys):
    callback = TargetVariance(schedule=VP(), clean=lambda batch: batch["picture"], **SETTINGS)
    fit = trainer(tmp_path, callback)
    fit.fit(Foreign(), DataLoader(Pictures(90), batch_size=16))
    assert (callback.curve.dsm.mean > 0).any()
    assert (tmp_path / "target_variance.png").exists()
    assert "V_STF (n = 4)" in capsys.readouterr().out
    for name in ("removed_variance.csv", "metrics.csv"):
        assert not (tmp_path / name).exists()


def test_clean_may_give_labels_that_mask_references(tmp_path):
    callback = TargetVariance(
        schedule=VP(), clean=lambda batch: Clean(batch["picture"], batch["label"]), **SETTINGS
    )
    trainer(tmp_path, callback).fit(Foreign(), DataLoader(Pictures(90), batch_size=16))
    assert float(callback.curve.ess[90].mean.max()) <= 30 + 1e-6


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ({}, "`schedule` and `clean`"),
        ({"schedule": VP()}, "`clean`"),
        ({"clean": len}, "`schedule`"),
    ],
)
def test_without_a_schedule_or_clean_samples_it_refuses_a_foreign_module(
    tmp_path, arguments, missing
):
    callback = TargetVariance(**arguments)
    with pytest.raises(MisconfigurationException, match=f"needs {missing} on a Foreign"):
        trainer(tmp_path, callback).fit(Foreign(), DataLoader(Pictures(90), batch_size=16))


@pytest.mark.parametrize("target", [None, STF(8)], ids=["read", "bank"])
def test_max_data_bounds_what_is_measured_on_and_says_so(tmp_path, caplog, target):
    callback = TargetVariance(max_data=40, **SETTINGS)
    trainer(tmp_path, callback, max_steps=1).fit(module(target), data())
    assert callback.curve.size == 40
    assert "40 of the 128 training samples" in caplog.text


def test_a_part_of_sorted_data_holds_every_class(tmp_path):
    def labelled(batch):
        return Clean(batch["picture"], batch["label"])

    callback = TargetVariance(schedule=VP(), clean=labelled, max_data=60, **SETTINGS)
    trainer(tmp_path, callback, max_steps=1).fit(Foreign(), DataLoader(Pictures(90), batch_size=16))
    # a third of 60 in each class; the first 60 of 90 would hold two classes of 30
    assert float(callback.curve.ess[60].mean.max()) <= 20 + 1e-6


def test_more_references_than_samples_are_refused(tmp_path):
    callback = TargetVariance(references=[129])
    with pytest.raises(ValueError, match=r"`references` .* between 1 and 128"):
        trainer(tmp_path, callback).fit(module(), data())


@pytest.mark.parametrize(
    "settings", [{"noise_levels": 1}, {"samples": 63}, {"max_data": 0}, {"references": [4, 0]}]
)
def test_arguments_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        TargetVariance(**settings)


class Captioned(DiffusionModule):
    def encode(self, batch):
        return Clean(batch["x0"], cond={"text": batch["x0"]})

    def predict(self, x, noised):
        return self.network(x, noised.t)


def test_with_a_continuous_condition_nothing_is_measured_and_the_log_says_why(tmp_path, caplog):
    torch.manual_seed(0)
    callback = TargetVariance(**SETTINGS)
    trainer(tmp_path, callback, max_steps=2).fit(Captioned(ResidualMLP(width=16, depth=1)), data())
    assert callback.curve is None
    assert "no two samples are exchangeable" in caplog.text
    assert [callback.state_dict()[name] for name in ("curve", "removed")] == [None] * 2


@pytest.mark.pictures
def test_the_picture_touches_no_global_state_of_matplotlib(tmp_path):
    before = dict(matplotlib.rcParams)
    trainer(tmp_path, TargetVariance(**SETTINGS), max_steps=1).fit(module(), data())
    assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()
