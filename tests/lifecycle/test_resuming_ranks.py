"""Two ranks that are stopped anywhere and resumed, on two ranks and on one."""

import functools
import os
import socket
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support.networks import small_mlp
from support.ranks import launch
from support.selections import mostly_slow
from support.stops import Terminate
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import (
    CARV,
    EMA,
    STF,
    DiffusionModule,
    LearnedProposal,
    TargetVariance,
    TaylorCV,
)
from lightning_vr.data import EightGaussians

pytestmark = [
    pytest.mark.usefixtures("no_pictures_in_module"),
    # what saves is not what resumes
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]

LIMIT = timedelta(seconds=60)
"""After so long ranks are taken to hang."""

EPOCHS, BATCHES, WINDOW, SAMPLES = 2, 5, 2, 4
WITHIN_WINDOW = [1, 3, 6, 8]
BETWEEN_WINDOWS = [2, 5, 7]
QUICK_BATCHES = [2, 3, 5, 8]

# Between two windows nothing is summed: what is resumed is the very state that was saved.
BITWISE = {"rtol": 0.0, "atol": 0.0}
# But what callbacks have added up in float64 since they last shared it is summed over the ranks.
WIDE_ROUNDING = {"rtol": 1e-13, "atol": 0.0}
# Gradients that wait in a window are saved as their mean over the ranks, and so are summed in
# another order than float32 gradients that each rank has kept for itself.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


class Record(Callback):
    """Keeps which samples each rank has seen, and saves the state at the end."""

    def __init__(self, folder):
        self.folder, self.positions = folder, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.positions.append(batch["index"])

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / "end.ckpt")
        found = {
            "positions": self.positions,
            "weights": nn.utils.parameters_to_vector(module.parameters()).detach(),
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def build():
    return DiffusionModule(
        small_mlp(std=0.3, num_class_embeds=9),
        num_classes=8,
        label_dropout=0.2,
        target=STF(16),
        draws=CARV(2, LearnedProposal(bins=3)),
        control_variate=TaylorCV(gate="open", bins=2, refit_every_n_steps=2),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9),
    )


def fit(folder, *extra, ranks=2, samples=SAMPLES, ckpt_path=None, start="fork"):
    """Train; with "popen" this is one of the ranks, as a launcher has started it."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5 if ckpt_path is None else 6)  # what a resumed run must not depend on
    watchers = [EMA(decay=0.9), TargetVariance([4], noise_levels=3, samples=64)]
    trainer = quiet_trainer(
        *watchers,
        *extra,
        Record(folder),
        strategy=DDPStrategy(start_method=start, timeout=LIMIT) if ranks > 1 else "auto",
        devices=ranks,
        max_epochs=EPOCHS,
        accumulate_grad_batches=WINDOW,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in extra),
        default_root_dir=folder,
    )
    data = EightGaussians(samples, num_samples=2 * SAMPLES * BATCHES + 3, num_validation=8)
    trainer.fit(build(), data, ckpt_path=ckpt_path, weights_only=True)
    return read(folder, ranks) if start == "fork" else None


def read(folder, ranks):
    files = [folder / "end.ckpt", *(folder / f"{rank}.pt" for rank in range(ranks))]
    return [torch.load(file, weights_only=True) for file in files]


class SaveAt(Callback):
    """Saves a checkpoint in each call of a hook."""

    def __init__(self, hook, folder):
        self.hook, self.folder, self.count = hook, folder, 0
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.hook}-{self.count}.ckpt")


class EndAt(Callback):
    """Ends the run after the n-th batch, as if it were over."""

    def __init__(self, count):
        self.count = count

    def on_train_batch_end(self, trainer, *args):
        self.count -= 1
        trainer.should_stop = self.count == 0


@pytest.fixture(scope="module")
def warm(no_pictures_in_module, tmp_path_factory):
    """Imports, and other first times, that each fork would have for itself."""
    fit(tmp_path_factory.mktemp("warm"), ranks=1)


def checkpoint(folder, count, hook="on_train_batch_end"):
    return folder / f"stopped/{hook}-{count}.ckpt"


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory):
    """Folders of two ranks that are not stopped, that save, and that go on from there."""
    folder = tmp_path_factory.mktemp("runs")
    hooks = ("on_train_batch_end", "on_train_epoch_end")

    def make(rank):
        fit(folder / "whole", start="popen")
        saving = (SaveAt(hook, folder / "stopped") for hook in hooks)
        fit(folder / "stopped", *saving, start="popen")
        for batch in QUICK_BATCHES:
            resume(folder, batch)
        saver = ModelCheckpoint(folder / "kept", save_last=True)
        fit(folder / "ended", EndAt(2), saver, start="popen")
        fit(folder / "ended", ckpt_path=folder / "kept/last.ckpt", start="popen")

    launch(make, 2)
    return folder


def resume(folder, batch):
    fit(folder / str(batch), ckpt_path=checkpoint(folder, batch), start="popen")


@pytest.fixture(scope="module")
def whole(runs):
    """Two ranks that are not stopped."""
    return read(runs / "whole", 2)


@pytest.fixture(scope="module")
def stopped(runs):
    """Checkpoints of two ranks at the n-th call of a hook, as if they had been stopped there."""
    return partial(checkpoint, runs)


def assert_alike(found, expected, where, **tolerance):
    """Nested states."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_alike(found[key], expected[key], f"{where}.{key}", **tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{where}.{i}", **tolerance)
    elif isinstance(expected, (torch.Tensor, float)):
        torch.testing.assert_close(
            found, expected, equal_nan=True, msg=lambda text: f"{where}: {text}", **tolerance
        )
    else:
        assert found == expected, where


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "lightning_vr")


@pytest.mark.parametrize(
    "batch", mostly_slow(sorted(WITHIN_WINDOW + BETWEEN_WINDOWS), QUICK_BATCHES)
)
def test_resumed_on_as_many_ranks_it_is_the_run_that_was_not_stopped(batch, runs, whole):
    if batch not in QUICK_BATCHES:
        launch(lambda _: resume(runs, batch), 2)
    end, *ranks = read(runs / str(batch), 2)
    tolerance = ROUNDING if batch in WITHIN_WINDOW else BITWISE
    for part in PARTS:
        is_summed = part == "callbacks" and tolerance is BITWISE
        own = WIDE_ROUNDING if is_summed else tolerance
        assert_alike(end[part], whole[0][part], part, **own)
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    for rank, expected in zip(ranks, whole[1:], strict=True):
        assert_alike(rank["positions"], expected["positions"][batch:], "positions", **BITWISE)


def test_resumed_on_one_rank_with_as_large_a_batch_it_takes_the_samples_of_both(
    stopped, whole, tmp_path
):
    _, alone = fit(tmp_path, ranks=1, samples=2 * SAMPLES, ckpt_path=stopped(3))
    pairs = zip(*(rank["positions"][3:] for rank in whole[1:]), strict=True)
    for mine, both in zip(alone["positions"], pairs, strict=True):
        assert sorted(mine.tolist()) == sorted(torch.cat(both).tolist())


def test_ranks_that_end_within_an_epoch_go_on_within_it(runs, whole):
    end, *ranks = read(runs / "ended", 2)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_alike(end[part], whole[0][part], part, **BITWISE)
    for rank, expected in zip(ranks, whole[1:], strict=True):
        assert_alike(rank["positions"], expected["positions"][2:], "positions", **BITWISE)


ENDS = [("on_train_batch_end", BATCHES), ("on_train_epoch_end", 1)]


@pytest.mark.parametrize("samples", [SAMPLES, 2 * SAMPLES])
@pytest.mark.parametrize(("hook", "count"), ENDS)
def test_resumed_on_one_rank_between_epochs_it_begins_the_next(
    hook, count, samples, stopped, whole, tmp_path
):
    end, alone = fit(tmp_path, ranks=1, samples=samples, ckpt_path=stopped(count, hook))
    batches = (2 * SAMPLES * BATCHES + 3) // samples
    assert len(alone["positions"]) == batches
    assert end["global_step"] == 3 + -(-batches // WINDOW)
    # the order of an epoch is dealt to however many ranks there are
    dealt = torch.stack([rank["positions"][BATCHES] for rank in whole[1:]], dim=1).flatten()
    begin = torch.cat(alone["positions"])[: len(dealt)]
    assert begin.tolist() == dealt.tolist()


@pytest.mark.parametrize("batch", [2, 3])
def test_resumed_within_an_epoch_with_another_number_of_samples_it_is_refused(
    batch, stopped, tmp_path
):
    path = stopped(batch)
    message = (
        "`batch_size` must be 8 on 1 processes, as the checkpoint is from the middle of an epoch "
        "with batches of 8 in all, got 4"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, ranks=1, ckpt_path=path)


def stop_by_signal_and_resume(folder, place):
    """For a launched process: Lightning hears of no errors in those it forks itself."""
    hook, count, _, rank = place
    if dist.is_initialized():
        meet_anew()
    saving = ModelCheckpoint(
        folder / "kept", save_last=True, save_on_exception=True, every_n_epochs=100
    )
    with pytest.raises(SIGTERMException):
        fit(folder, saving, Terminate(hook, count, rank), start="popen")
    meet_anew()
    fit(folder, ckpt_path=folder / "kept/last.ckpt", start="popen")


def meet_anew():
    """Let ranks meet at another port: those of one meeting know that they were asked to stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = [free.getsockname()[1]]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port[0])


PLACES = [
    ("on_train_batch_start", 4, 2),  # the end of a window
    ("on_train_batch_start", 2 * BATCHES - 2, 4),
    ("on_before_optimizer_step", 2, 2),
    ("on_validation_batch_start", 1, 3),  # after the first epoch
]


SIGNALS = [(*place, rank) for place in PLACES for rank in (0, 1)]
QUICK_SIGNALS = [(*place, i % 2) for i, place in enumerate(PLACES)]


@pytest.fixture(scope="module")
def signalled(warm, tmp_path_factory):
    """The folder of two ranks of which one was sent a signal, and which then went on."""

    @functools.cache
    def made(is_quick):
        places = [each for each in SIGNALS if (each in QUICK_SIGNALS) == is_quick]
        folders = {place: tmp_path_factory.mktemp("signalled") for place in places}
        launch(lambda _: [stop_by_signal_and_resume(folders[each], each) for each in places], 2)
        return folders

    return lambda place: made(place in QUICK_SIGNALS)[place]


@pytest.mark.parametrize(("hook", "count", "steps", "rank"), mostly_slow(SIGNALS, QUICK_SIGNALS))
def test_a_signal_to_one_rank_stops_both_at_the_end_of_the_batch_and_they_resume(
    hook, count, steps, rank, whole, signalled
):
    folder = signalled((hook, count, steps, rank))
    path = folder / "kept/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == steps
    (end, *_), (expected, *_) = read(folder, 2), whole
    for part in ("state_dict", "optimizer_states"):
        assert_alike(end[part], expected[part], part, **ROUNDING)
