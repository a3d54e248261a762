"""Any LightningModule on ResumableModule: a plain classifier, with dropout and accumulation."""

import os

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.comparisons import assert_equal, logs
from support.forks import exit_code
from support.stops import DieAt, StopAt, StoppedError
from torch import nn
from torch.nn import functional as F

from lightning_vr import DiffusionModule, ResidualMLP, ResumableModule
from lightning_vr.core.distributed import SynchronizedError
from lightning_vr.data import Digits

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:The dirpath has changed from"
)


class Classifier(ResumableModule):
    """It knows nothing of diffusion."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 10)
        )

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.layers(batch["image"]), batch["label"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.layers(batch["image"]), batch["label"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(folder, *callbacks, ckpt_path=None, kind=Classifier, **options):
    """Train for two epochs of five batches and more, and return the state at the end."""
    torch.manual_seed(0)
    end = folder / "end.ckpt"
    settings = {
        "max_epochs": 2,
        "limit_train_batches": 7,
        "limit_val_batches": 1,
        "accumulate_grad_batches": 2,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    trainer = Trainer(
        **(settings | options), callbacks=list(callbacks), logger=CSVLogger(folder, name="")
    )
    trainer.fit(kind(), Digits(batch_size=32), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(end)
    return torch.load(end, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The state and the logs of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(folder), logs(folder)


@pytest.mark.parametrize("batch", [1, 4, 6, 7, 8, 13])
@pytest.mark.parametrize("kind", [StopAt, DieAt])
def test_a_classifier_that_is_killed_resumes_bitwise(whole, tmp_path, batch, kind):
    path = tmp_path / "stopped.ckpt"
    stop = kind("on_train_batch_end", batch, path)
    if kind is DieAt:
        assert exit_code(lambda: fit(tmp_path, stop), 60) == 9
    else:
        with pytest.raises(StoppedError):
            fit(tmp_path, stop)
    end, expected = fit(tmp_path, ckpt_path=path), whole[0]
    assert_equal(end["state_dict"], expected["state_dict"])
    assert_equal(end["optimizer_states"], expected["optimizer_states"])
    assert logs(tmp_path) == whole[1]


def test_dropout_repeats_and_is_new_in_each_step(tmp_path):
    def run(drawn):
        class Watched(Classifier):
            def training_step(self, batch, batch_idx):
                drawn.append(float(torch.rand(())))
                return super().training_step(batch, batch_idx)

        fit(tmp_path, kind=Watched)
        return drawn

    first = run([])
    assert len(set(first)) == len(first) == 14
    assert run([]) == first


def test_a_checkpoint_and_its_folder_are_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed, flush, folder = [], os.fsync, tmp_path / "saved"

    def note(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    fit(tmp_path, ModelCheckpoint(folder, filename="one"), max_epochs=1)
    file, *_ = (i for i, name in enumerate(flushed) if name.startswith(f"{folder}/"))
    assert flushed[file].endswith(".partial")
    assert flushed[file + 1] == str(folder)
    assert [path.name for path in folder.iterdir()] == ["one.ckpt"]


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_parameter(tmp_path):
    class Broken(Classifier):
        def on_after_backward(self):
            self.layers[1].weight.grad[0, 0] = torch.nan

    with pytest.raises(SynchronizedError, match=r"gradient of `layers\.1\.weight`"):
        fit(tmp_path, kind=Broken)


@pytest.mark.parametrize("base", [Classifier, DiffusionModule])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_hook_that_is_overridden_without_super_is_an_error_in_the_first_step(
    tmp_path, base, hook
):
    seen = []

    class Forgetful(base):
        def __init__(self):
            super().__init__(*([] if base is Classifier else [ResidualMLP(64)]))

        def encode(self, batch):
            return super().encode(batch["image"].flatten(1))

        def on_train_batch_end(self, *arguments):
            seen.append(arguments)

    setattr(Forgetful, hook, lambda self: None)
    with pytest.raises(MisconfigurationException, match=rf"`Forgetful\.{hook}` must call `super"):
        fit(tmp_path, kind=Forgetful)
    assert not seen


def test_a_batch_hook_without_super_is_an_error_too(tmp_path):
    class Forgetful(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            pass

    with pytest.raises(MisconfigurationException, match=r"`Forgetful\.on_train_batch_start` must"):
        fit(tmp_path, kind=Forgetful)


def test_an_earlier_fit_does_not_stand_for_the_hooks_of_the_next_one(tmp_path):
    class Forgetful(Classifier):
        forgets = False

        def on_train_start(self):
            if not self.forgets:
                super().on_train_start()

    fit(tmp_path, kind=Forgetful, max_epochs=1)
    Forgetful.forgets = True
    with pytest.raises(MisconfigurationException, match="on_train_start"):
        fit(tmp_path, kind=Forgetful, max_epochs=1)


def test_prepare_training_needs_no_super(tmp_path):
    class Prepared(Classifier):
        prepared = 0

        def prepare_training(self):
            type(self).prepared += 1

    fit(tmp_path, kind=Prepared, max_epochs=1)
    assert Prepared.prepared == 1


def test_a_loss_that_is_not_finite_is_not_said_to_be(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(SynchronizedError, match=r"the gradient of `layers.*look for NaN in the"):
        fit(tmp_path, kind=Broken)
