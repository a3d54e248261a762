"""A run that is stopped anywhere and resumed is the run that was not stopped, bit by bit."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from same_runs import StopAt, StoppedError, assert_equal, logs
from torch import nn

from lightning_vr import (
    CARV,
    MLP,
    STF,
    Clean,
    DiffusionModule,
    FrechetDistance,
    GradientVariance,
    LearnedProposal,
    TargetVariance,
    TaylorCV,
)
from lightning_vr.data import EightGaussians

EPOCHS, BATCHES, WINDOW = 3, 5, 2


class Noisy(nn.Module):
    """A network with dropout."""

    def __init__(self):
        super().__init__()
        self.inner = MLP(2, width=8, depth=1, num_class_embeds=9)
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
    "taylor": lambda: {"control_variate": TaylorCV(gate="open", refit_every_n_steps=3)},
}


def build(kind, slots):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Noisy()
    return kind(
        network,
        num_classes=8,
        label_dropout=0.2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.9),
        **SLOTS[slots](),
    )


def watchers(slots):
    callbacks = [EMAWeightAveraging(decay=0.9), GradientVariance(every_n_steps=3, noise_levels=2)]
    if slots != "taylor":
        callbacks.append(TargetVariance(references=[4], noise_levels=3, samples=64))
    return [*callbacks, FrechetDistance(samples=40)]


def fit(folder, *extra, slots="plain", kind=Random, ckpt_path=None, workers=0, **options):
    torch.manual_seed(5)  # what a resumed run must not depend on
    if ckpt_path is not None:
        torch.manual_seed(6)
    module = build(kind, slots)
    settings = {"max_epochs": EPOCHS, "accumulate_grad_batches": WINDOW, "val_check_interval": 2}
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, name=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[*watchers(slots), *extra],
        **(settings | options),
    )
    data = EightGaussians(8, num_samples=8 * BATCHES + 3, num_validation=8, num_workers=workers)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return torch.load(folder / "end.ckpt", weights_only=True)


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "lightning_vr")


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Pictures would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that are not stopped, by slots."""
    done = {}

    def get(slots):
        if slots not in done:
            folder = tmp_path_factory.mktemp(slots)
            done[slots] = fit(folder, slots=slots), logs(folder)
        return done[slots]

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
    check(stop_and_resume(tmp_path, "on_train_batch_end", batch), whole("plain"))


@pytest.mark.parametrize("stops", [(5, 1), (2, 3, 4), (10, 2), (4, 1, 1, 1)])
def test_stopped_again_and_again(stops, whole, tmp_path):
    path, before = tmp_path / "stopped.ckpt", None
    for batches in stops:
        with pytest.raises(StoppedError):
            fit(tmp_path, StopAt("on_train_batch_end", batches, path), ckpt_path=before)
        before = path
    check((fit(tmp_path, ckpt_path=path), logs(tmp_path)), whole("plain"))


@pytest.mark.parametrize("slots", ["stf", "carv", "taylor"])
@pytest.mark.parametrize("batch", [5, 6, 13])
def test_stopped_with_what_estimators_learn(batch, slots, whole, tmp_path):
    found = stop_and_resume(tmp_path, "on_train_batch_end", batch, slots=slots)
    check(found, whole(slots))


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("count", [1, 2])
def test_stopped_after_validation_or_an_epoch(hook, count, whole, tmp_path):
    check(stop_and_resume(tmp_path, hook, count), whole("plain"))


def test_stopped_with_worker_processes(whole, tmp_path):
    found = stop_and_resume(tmp_path, "on_train_batch_end", 7, workers=1)
    check(found, whole("plain"))
