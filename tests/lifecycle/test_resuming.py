"""A run that is stopped anywhere and resumed is the run that was not stopped, bit by bit."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support.comparisons import assert_equal, logs
from support.forks import exit_code
from support.stops import DieAt, StopAt, StoppedError, Terminate
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import (
    CARV,
    STF,
    Clean,
    DiffusionModule,
    FrechetDistance,
    GradientVariance,
    LearnedProposal,
    ResidualMLP,
    Sampler,
    TargetVariance,
    TaylorCV,
)
from lightning_vr.data import EightGaussians

pytestmark = [
    pytest.mark.usefixtures("no_pictures_in_module"),
    # what saves is not what resumes
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

EPOCHS, BATCHES, WINDOW = 2, 5, 2


class Noisy(nn.Module):
    """A network with dropout."""

    def __init__(self):
        super().__init__()
        self.inner = ResidualMLP(2, width=8, depth=1, num_class_embeds=9)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x, t, class_labels=None):
        return self.dropout(self.inner(x, t, class_labels)) + 0.1 * x


class Random(DiffusionModule):
    """A module whose upstream draws from torch's global generator."""

    def encode(self, batch):
        clean = Clean.from_batch(batch)
        return Clean(clean.x0 + 0.01 * torch.randn_like(clean.x0), clean.group, index=clean.index)


SLOTS = {
    "plain": dict,
    "stf": lambda: {"target": STF(16)},
    "carv": lambda: {"draws": CARV(2, LearnedProposal(bins=4), antithetic=True)},
    "taylor": lambda: {"control_variate": TaylorCV(bins=2, gate="open", refit_every_n_steps=3)},
}


def build(kind, slots):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Noisy()
    return kind(
        network,
        num_classes=8,
        label_dropout=0.2,
        sampler=Sampler(steps=3),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.9),
        **SLOTS[slots](),
    )


def watchers(slots):
    callbacks = [EMAWeightAveraging(decay=0.9), GradientVariance(every_n_steps=3, noise_levels=2)]
    if slots != "taylor":
        callbacks.append(TargetVariance(references=[4], noise_levels=3, samples=64))
    return [*callbacks, FrechetDistance(samples=40)]


def fit(
    folder,
    *extra,
    slots="plain",
    kind=Random,
    module=None,
    ckpt_path=None,
    workers=0,
    validation=8,
    **options,
):
    torch.manual_seed(5)  # what a resumed run must not depend on
    if ckpt_path is not None:
        torch.manual_seed(6)
    module = module or build(kind, slots)
    settings = {"max_epochs": EPOCHS, "accumulate_grad_batches": WINDOW, "val_check_interval": 2}
    trainer = quiet_trainer(
        *watchers(slots),
        *extra,
        logger=CSVLogger(folder, name=""),
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in extra),
        log_every_n_steps=1,
        **(settings | options),
    )
    data = EightGaussians(
        8, num_samples=8 * BATCHES + 3, num_validation=validation, num_workers=workers
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    # what a stranger could have written is read slowly; resumed runs read like that
    return torch.load(folder / "end.ckpt", weights_only=False)


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "lightning_vr")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that are not stopped, by slots and options."""
    done = {}

    def get(slots="plain", **options):
        key = slots, str(options)
        if key not in done:
            folder = tmp_path_factory.mktemp(slots)
            done[key] = fit(folder, slots=slots, **options), logs(folder)
        return done[key]

    return get


def stop_and_resume(folder, hook, count, **options):
    path = folder / "stopped.ckpt"
    with pytest.raises(StoppedError):
        fit(folder, StopAt(hook, count, path), **options)
    return fit(folder, ckpt_path=path, **options), logs(folder)


def check(found, expected):
    for part in PARTS:
        assert_equal(found[0][part], expected[0][part], part)
    assert found[1].keys() == expected[1].keys()
    assert found[1] == expected[1]


@pytest.mark.parametrize("batch", range(1, EPOCHS * BATCHES))
def test_stopped_after_any_batch(batch, whole, tmp_path):
    check(stop_and_resume(tmp_path, "on_train_batch_end", batch), whole())


LONG = {"max_epochs": 3}
"""A run with an epoch that others come before and after."""


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, LONG["max_epochs"] * BATCHES))
def test_stopped_after_any_batch_of_a_longer_run(batch, whole, tmp_path):
    found = stop_and_resume(tmp_path, "on_train_batch_end", batch, **LONG)
    check(found, whole(**LONG))


@pytest.mark.parametrize("stops", [(5, 1), (2, 3, 4), (10, 2), (4, 1, 1, 1)])
def test_stopped_again_and_again(stops, whole, tmp_path):
    path, before = tmp_path / "stopped.ckpt", None
    for batches in stops:
        stop = StopAt("on_train_batch_end", batches, path)
        with pytest.raises(StoppedError):
            fit(tmp_path, stop, ckpt_path=before, **LONG)
        before = path
    check((fit(tmp_path, ckpt_path=path, **LONG), logs(tmp_path)), whole(**LONG))


@pytest.mark.parametrize("slots", ["stf", "carv", "taylor"])
@pytest.mark.parametrize("batch", [5, 6, 8])
def test_stopped_with_what_estimators_learn(batch, slots, whole, tmp_path):
    found = stop_and_resume(tmp_path, "on_train_batch_end", batch, slots=slots)
    check(found, whole(slots))


@pytest.mark.parametrize(
    "hook",
    [
        "on_validation_start",
        # once averaged weights are in place, and once they are not any more
        "on_validation_epoch_start",
        "on_validation_epoch_end",
        "on_validation_end",
        "on_train_epoch_end",
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_stopped_around_validation_or_after_an_epoch(hook, count, whole, tmp_path):
    check(stop_and_resume(tmp_path, hook, count), whole())


def test_a_run_that_has_ended_goes_on_from_the_weights_that_trained(whole, tmp_path):
    """Not from their average, which is in place then."""
    end = fit(tmp_path, max_epochs=1)
    assert any(
        not torch.equal(value, end["current_model_state"][name])
        for name, value in end["state_dict"].items()
        if name.startswith("network.")
    )
    check((fit(tmp_path, ckpt_path=tmp_path / "end.ckpt"), logs(tmp_path)), whole())


def test_a_fit_that_ended_within_validation_leaves_nothing_to_the_next(whole, tmp_path):
    path, module = tmp_path / "stopped.ckpt", build(Random, "plain")
    with pytest.raises(StoppedError):
        fit(tmp_path, StopAt("on_train_batch_end", 1, path))
    with pytest.raises(StoppedError):
        fit(tmp_path / "other", StopAt("on_validation_batch_end", 1, tmp_path / "x"), module=module)
    module.train()
    check((fit(tmp_path, ckpt_path=path, module=module), logs(tmp_path)), whole())


@pytest.mark.parametrize("batch", [3, 4, 5, 8, 10])
def test_stopped_as_a_batch_begins_in_windows_that_an_epoch_cuts_short(batch, whole, tmp_path):
    options = {"accumulate_grad_batches": 3}
    found = stop_and_resume(tmp_path, "on_train_batch_start", batch, **options)
    check(found, whole(**options))


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("batch", [2, 3, 7, 8])
def test_gone_as_soon_as_a_checkpoint_is_written(batch, whole, tmp_path):
    """What a checkpoint takes for logged is in the files."""
    path = tmp_path / "stopped.ckpt"
    assert exit_code(lambda: fit(tmp_path, DieAt("on_train_batch_end", batch, path)), 60) == 9
    check((fit(tmp_path, ckpt_path=path), logs(tmp_path)), whole())


STEPS = {"max_epochs": -1, "max_steps": 7, "check_val_every_n_epoch": None}
"""A run whose length is counted in steps, as the configurations count: it ends in an epoch."""


@pytest.mark.parametrize(
    ("hook", "count"),
    [("on_train_batch_end", n) for n in (1, 4, 5, 6, 10)]
    + [("on_train_epoch_end", 1), ("on_train_epoch_end", 2), ("on_validation_end", 2)],
)
def test_stopped_where_steps_are_counted(hook, count, whole, tmp_path):
    check(stop_and_resume(tmp_path, hook, count, **STEPS), whole(**STEPS))


LAST = "kept/last.ckpt"


def saving(folder):
    return ModelCheckpoint(
        folder / "kept", save_last=True, save_on_exception=True, every_n_epochs=100
    )


def terminate_and_resume(folder, hook, count, **options):
    with pytest.raises(SIGTERMException):
        fit(folder, saving(folder), Terminate(hook, count), **options)
    return fit(folder, ckpt_path=folder / LAST, **options), logs(folder)


@pytest.mark.parametrize("options", [{}, STEPS], ids=["epochs", "steps"])
@pytest.mark.parametrize("batch", [4, 5, 6])
def test_asked_to_stop_in_a_batch(batch, options, whole, tmp_path):
    found = terminate_and_resume(tmp_path, "on_train_batch_start", batch, **options)
    check(found, whole(**options))


class Requeue(Callback):
    """Sends what SLURM sends ahead of its time limit, before the n-th optimizer step."""

    def __init__(self, count):
        self.count = count

    def on_before_optimizer_step(self, *args):
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_queued_again_by_slurm_in_mid_step(step, whole, tmp_path, monkeypatch):
    task = {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NTASKS": "1", "NTASKS_PER_NODE": "1"}
    for name, value in (task | {"NNODES": "1", "JOB_ID": "4711", "JOB_NAME": "job"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    called = []
    monkeypatch.setattr(signal_connector, "call", lambda command: called.append(command) or 0)
    options = {"default_root_dir": tmp_path, "devices": 1, "num_nodes": 1}
    fit(tmp_path / "first", Requeue(step), **options)
    assert called == [["scontrol", "requeue", "4711"]]
    # found in the root folder, as when the job is back
    resumed = fit(tmp_path / "second", **options)
    for part in PARTS:
        assert_equal(resumed[part], whole()[0][part], part)
    written, expected = logs(tmp_path / "second"), whole()[1]
    assert written.items() <= expected.items()
    assert 0 < len(written) < len(expected)


TWO_BATCHES = {"validation": 16}


@pytest.mark.parametrize("batch", [1, 3, 4, 5])
def test_asked_to_stop_within_a_validation_run(batch, whole, tmp_path):
    found = terminate_and_resume(tmp_path, "on_validation_batch_start", batch, **TWO_BATCHES)
    check(found, whole(**TWO_BATCHES))


class Fail(Callback):
    """Fails once gradients of the n-th batch are there."""

    def __init__(self, count):
        self.count = count

    def on_after_backward(self, trainer, pl_module):
        self.count -= 1
        if self.count == 0:
            raise StoppedError


@pytest.mark.parametrize(("batch", "lost"), [(3, 0), (4, 1)])
def test_a_gradient_of_a_batch_that_failed_is_not_kept(batch, lost, whole, tmp_path):
    with pytest.raises(StoppedError):
        fit(tmp_path, saving(tmp_path), Fail(batch))
    window = torch.load(tmp_path / LAST, weights_only=True)["lightning_vr"]["window"]
    if not lost:  # the first of a window: nothing waits, and it is taken again
        assert window is None
        check((fit(tmp_path, ckpt_path=tmp_path / LAST), logs(tmp_path)), whole())
        return
    assert (window["lost"], window["gradients"]) == (1, {})
    with pytest.warns(UserWarning, match="gradients of 1 batches are lost"):
        fit(tmp_path, ckpt_path=tmp_path / LAST)


class Refuse(Callback):
    def on_train_start(self, trainer, pl_module):
        raise StoppedError


def test_a_resume_that_is_refused_saves_what_it_was_to_resume_from(whole, tmp_path):
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(StoppedError):
        fit(tmp_path, StopAt("on_train_batch_end", 3, path))
    with pytest.raises(StoppedError):
        fit(tmp_path, saving(tmp_path), Refuse(), ckpt_path=path)
    found = fit(tmp_path, ckpt_path=tmp_path / LAST), logs(tmp_path)
    check(found, whole())


def test_a_checkpoint_of_a_validation_run_that_was_made_up_for_asks_for_no_other(whole, tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    with pytest.raises(StoppedError):
        fit(tmp_path, StopAt("on_train_batch_end", 4, first))
    with pytest.raises(StoppedError):
        fit(tmp_path, StopAt("on_validation_end", 1, second), ckpt_path=first)
    check((fit(tmp_path, ckpt_path=second), logs(tmp_path)), whole())


def test_stopped_after_the_last_step_where_steps_are_counted(whole, tmp_path):
    # 2, 2 and 1 batches in the steps of an epoch
    with pytest.warns(UserWarning, match="is from the run's last step"):
        end, found = stop_and_resume(tmp_path, "on_train_batch_end", 12, **STEPS)
    expected_end, expected = whole(**STEPS)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(end[part], expected_end[part], part)
    assert found["6", "train/loss"] == expected["6", "train/loss"]
    assert set(expected) - set(found) == {("6", "val/loss"), ("7", "frechet_distance/identity_n40")}


def test_stopped_with_worker_processes(whole, tmp_path):
    found = stop_and_resume(tmp_path, "on_train_batch_end", 7, workers=1)
    check(found, whole())
