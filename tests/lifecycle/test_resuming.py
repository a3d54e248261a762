"""A run that is stopped anywhere and resumed is the run that was not stopped, bit by bit."""

import os
import signal
from itertools import product

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from resumed_runs import BATCHES, EPOCHS, PARTS, Random, build, check, fit, stop_and_resume
from support.comparisons import assert_equal, logs
from support.forks import exit_code
from support.selections import mostly_slow
from support.stops import DieAt, StopAt, StoppedError, Terminate

pytestmark = [
    pytest.mark.usefixtures("no_pictures_in_module"),
    # what saves is not what resumes
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


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


@pytest.mark.parametrize("stops", [(10, 2), (4, 1, 1, 1)])
def test_stopped_again_and_again(stops, whole, tmp_path):
    check_stops(stops, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(5, 1), (2, 3, 4)])
def test_stopped_again_elsewhere(stops, whole, tmp_path):
    check_stops(stops, whole, tmp_path)


def check_stops(stops, whole, tmp_path):
    path, before = tmp_path / "stopped.ckpt", None
    for batches in stops:
        stop = StopAt("on_train_batch_end", batches, path)
        with pytest.raises(StoppedError):
            fit(tmp_path, stop, ckpt_path=before, **LONG)
        before = path
    check((fit(tmp_path, ckpt_path=path, **LONG), logs(tmp_path)), whole(**LONG))


@pytest.mark.parametrize(
    ("batch", "slots"),
    mostly_slow(
        list(product([5, 6, 8], ["stf", "carv", "taylor"])),
        [(5, "stf"), (8, "stf"), (6, "carv"), (8, "carv"), (5, "taylor"), (6, "taylor")],
    ),
)
def test_stopped_with_what_estimators_learn(batch, slots, whole, tmp_path):
    found = stop_and_resume(tmp_path, "on_train_batch_end", batch, slots=slots)
    check(found, whole(slots))


HOOKS = [
    "on_validation_start",
    # once averaged weights are in place, and once they are not any more
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


@pytest.mark.parametrize(
    ("hook", "count"),
    mostly_slow(
        list(product(HOOKS, [1, 2])),
        [(hook, 1 + i % 2) for i, hook in enumerate(HOOKS)] + [("on_train_epoch_end", 2)],
    ),
)
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


@pytest.mark.parametrize("batch", mostly_slow([3, 4, 5, 8, 10], [4, 5, 8]))
def test_stopped_as_a_batch_begins_in_windows_that_an_epoch_cuts_short(batch, whole, tmp_path):
    options = {"accumulate_grad_batches": 3}
    found = stop_and_resume(tmp_path, "on_train_batch_start", batch, **options)
    check(found, whole(**options))


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("batch", mostly_slow([2, 3, 7, 8], [2, 7]))
def test_gone_as_soon_as_a_checkpoint_is_written(batch, whole, tmp_path):
    """What a checkpoint takes for logged is in the files."""
    path = tmp_path / "stopped.ckpt"
    assert exit_code(lambda: fit(tmp_path, DieAt("on_train_batch_end", batch, path)), 60) == 9
    check((fit(tmp_path, ckpt_path=path), logs(tmp_path)), whole())


STEPS = {"max_epochs": -1, "max_steps": 7, "check_val_every_n_epoch": None}
"""A run whose length is counted in steps, as the configurations count: it ends in an epoch."""


@pytest.mark.parametrize(
    ("hook", "count"),
    mostly_slow(
        [("on_train_batch_end", n) for n in (1, 4, 5, 6, 10)]
        + [("on_train_epoch_end", 1), ("on_train_epoch_end", 2), ("on_validation_end", 2)],
        [("on_train_batch_end", n) for n in (1, 5, 6)]
        + [("on_train_epoch_end", 2), ("on_validation_end", 2)],
    ),
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


@pytest.mark.parametrize(
    ("batch", "options"),
    mostly_slow(list(product([4, 5, 6], [{}, STEPS])), [(4, STEPS), (5, {}), (5, STEPS), (6, {})]),
)
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


@pytest.mark.parametrize("step", mostly_slow([1, 2, 3], [1, 3]))
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


@pytest.mark.parametrize("batch", mostly_slow([1, 3, 4, 5], [1, 4]))
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
    assert set(expected) - set(found) == {("6", "val/loss"), ("6", "frechet_distance/identity_n40")}


@pytest.mark.slow
def test_stopped_with_worker_processes(whole, tmp_path):
    """As runs of `test_epoch_position.py` are, of a simpler model."""
    found = stop_and_resume(tmp_path, "on_train_batch_end", 7, workers=1)
    check(found, whole())
