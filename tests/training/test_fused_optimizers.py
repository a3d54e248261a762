"""Fused optimizers: bad steps left out on the device, and how often a step waits for it."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.networks import small_mlp
from support.points import Points
from support.trainers import quiet_trainer
from support.waits import Waits
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import CARV, STF, DiffusionModule, LearnedProposal, TaylorCV
from lightning_vr.core import devices
from lightning_vr.lifecycle.finite_guard import MOST_SKIPPED

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

POINTS, BATCH_SIZE = 32, 8


def module(*, fused=True, **options):
    settings = {"lr": 0.01, "weight_decay": 0.1, "fused": fused}
    return DiffusionModule(
        small_mlp(std=0.3), optimizer=lambda p: torch.optim.AdamW(p, **settings), **options
    )


def loader():
    x = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(0))
    return DataLoader(Points(x), batch_size=BATCH_SIZE)


class Watch(Callback):
    """Spoils the gradient of some steps, and keeps the weights after each."""

    def __init__(self, *bad):
        self.bad, self.seen = bad, []

    def on_after_backward(self, trainer, module):
        if trainer.global_step in self.bad:
            module.network.project_out.bias.grad[1] = torch.nan

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(nn.utils.parameters_to_vector(module.parameters()).detach().clone())


def trainer(*callbacks, **options):
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "limit_val_batches": 0}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return quiet_trainer(*callbacks, **(settings | {"enable_checkpointing": saves} | options))


def moved(weights):
    return [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0, "precision": "bf16-mixed"}])
def test_a_bad_step_is_left_out_on_the_device_as_by_the_host(options):
    fused, plain = Watch(2, 3, 7), Watch(2, 3, 7)
    for watch, model in (
        (fused, module(on_nonfinite="skip")),
        (plain, module(on_nonfinite="skip", fused=False)),
    ):
        fit = trainer(watch, **options)
        with pytest.warns(match="Optimizer step 2 met .* the gradient of `network.project_out"):
            fit.fit(model, loader())
        assert model._guard.skipped == 3
        assert not any("found_inf" in vars(optimizer) for optimizer in fit.optimizers)
    assert moved(fused.seen) == [True, False, False, True, True, True, False]
    for ours, other in zip(fused.seen, plain.seen, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_a_bad_step_ends_the_run_one_step_late_with_the_weights_before_it(tmp_path):
    watch = Watch(2)
    saved = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(ValueError, match="Optimizer step 2 met"):
        trainer(watch, saved).fit(module(), loader())
    assert moved(watch.seen) == [True, False]
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    kept = torch.cat([weights[name].flatten() for name, _ in module().named_parameters()])
    assert torch.equal(kept, watch.seen[1])


def test_a_bad_last_step_is_an_error_at_the_end():
    with pytest.raises(ValueError, match="Optimizer step 7 met"):
        trainer(Watch(7)).fit(module(), loader())


def test_a_bad_batch_is_named_one_step_late():
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                batch["x0"][5] = torch.nan

    with pytest.raises(ValueError, match=r"step 2 met.*sample 21, .*batch 0 of the step, is not"):
        trainer(Spoil()).fit(module(on_nonfinite="raise"), loader())


def test_leaving_out_ends_with_more_steps_in_a_row_than_are_an_accident():
    watch = Watch(*range(2, 100))
    with (
        pytest.warns(match="The step is left out"),
        pytest.raises(ValueError, match=f"so in {MOST_SKIPPED + 1} steps in a row"),
    ):
        trainer(watch, max_epochs=100).fit(module(on_nonfinite="skip"), loader())
    assert moved(watch.seen) == [True] + [False] * (len(watch.seen) - 2)


def test_a_checkpoint_counts_a_step_that_is_not_looked_at_yet(tmp_path):
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    with pytest.warns(match="The step is left out"):
        trainer(Watch(2), saved, max_epochs=1).fit(module(on_nonfinite="skip"), loader())
    counts = [
        torch.load(tmp_path / f"epoch=0-step={step}.ckpt", weights_only=True) for step in (2, 3, 4)
    ]
    assert [state["lightning_vr"]["skipped"] for state in counts] == [0, 1, 1]


class Steps(Callback):
    """Counts from the start of one batch to that of another."""

    def __init__(self, first, last):
        self.first, self.last, self.mode = first, last, Waits()

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.first:
            self.mode.__enter__()
        if trainer.global_step == self.last:
            self.mode.__exit__(None, None, None)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(dict, id="DSM"),
        pytest.param(lambda: {"target": STF("all")}, id="all"),
        pytest.param(lambda: {"target": STF(16)}, id="drawn"),
        pytest.param(lambda: {"target": STF("batch")}, id="batch"),
        pytest.param(lambda: {"draws": CARV(2, LearnedProposal(bins=2))}, id="carv"),
        pytest.param(lambda: {"control_variate": TaylorCV(bins=2, gate="open")}, id="taylor"),
    ],
)
def test_a_step_waits_for_its_device_once(build, monkeypatch):
    monkeypatch.setattr(devices, "host_waits", lambda device: True)
    steps = Steps(5, 7)  # within an epoch
    options = {"gradient_clip_val": 1.0, "log_every_n_steps": 100}
    trainer(steps, **options).fit(module(**build()), loader())
    assert steps.mode.names == ["_local_scalar_dense"] * 2


class NoWait(Callback):
    """Lets CUDA raise where the host waits for the device, except for events."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step in (5, 7):
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step == 5 else "default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("build", [dict, lambda: {"target": STF("all")}], ids=["DSM", "all"])
def test_on_a_gpu_a_step_waits_for_the_number_of_the_step_before_alone(build):
    options = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}
    try:
        trainer(NoWait(), gradient_clip_val=1.0, log_every_n_steps=100, **options).fit(
            module(**build()), loader()
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
