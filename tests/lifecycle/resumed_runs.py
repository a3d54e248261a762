"""Runs with all that has a state, that are stopped and resumed, and what they leave behind."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.comparisons import assert_equal, logs
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import (
    CARV,
    STF,
    Clean,
    DiffusionModule,
    Euler,
    FrechetDistance,
    GradientVariance,
    LearnedProposal,
    ResidualMLP,
    Sampler,
    TargetVariance,
    TaylorCV,
)
from lightning_vr.data import EightGaussians

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
        sampler=Sampler(Euler(), steps=2),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.9),
        **SLOTS[slots](),
    )


def watchers(slots):
    gradients = GradientVariance(every_n_steps=3, samples=4, noise_levels=2)
    callbacks = [EMAWeightAveraging(decay=0.9), gradients]
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
