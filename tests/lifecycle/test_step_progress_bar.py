"""The progress bar counts steps where epochs are not limited, and batches where they are."""

import io

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from rich.console import Console
from support.networks import small_mlp

from lightning_vr import DiffusionModule
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.step_progress_bar import StepProgressBar, use_step_progress_bar

BATCHES = 5


class Seen(Callback):
    """What the bar of training says after each batch, and at the start of each validation run."""

    def __init__(self):
        self.batches, self.validations, self.starts = [], [], set()

    def on_train_batch_end(self, trainer, *_):
        self.batches.append(self.text(trainer))
        self.starts.add(trainer.progress_bar_callback.train_progress_bar.start_time)

    def on_validation_batch_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self.validations.append(self.text(trainer))

    @staticmethod
    def text(trainer):
        console = Console(file=io.StringIO(), width=150)
        console.print(trainer.progress_bar_callback.progress)
        return " ".join(console.file.getvalue().split())


def seen_in(tmp_path, ckpt_path=None, **options):
    seen = Seen()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    use_step_progress_bar(trainer)
    trainer.callbacks.append(seen)  # after the bar
    data = EightGaussians(8, num_samples=8 * BATCHES, num_validation=16)
    trainer.fit(DiffusionModule(small_mlp()), data, ckpt_path=ckpt_path, weights_only=True)
    return seen


NO_FILES = {"enable_checkpointing": False}
TRAINING = NO_FILES | {"limit_val_batches": 0}


def test_steps_are_counted_through_all_epochs(tmp_path):
    seen = seen_in(tmp_path, max_steps=12, **NO_FILES)
    assert len(seen.batches) == 12
    for step, text in enumerate(seen.batches, start=1):
        assert text.startswith(f"step {step}/12 ")
        assert "Epoch" not in text
    assert all("Validation" in text for text in seen.validations)
    assert "step 5/12 " in seen.validations[0]


def test_the_time_left_is_that_of_the_run(tmp_path):
    seen = seen_in(tmp_path, max_steps=12, **TRAINING)
    # the bar does not begin anew with an epoch, and neither does its clock
    assert len(seen.starts) == 1


def test_accumulated_batches_make_one_step(tmp_path):
    seen = seen_in(tmp_path, max_steps=4, accumulate_grad_batches=2, **TRAINING)
    counts = [text.split()[1] for text in seen.batches]
    assert counts == ["0/4", "1/4", "1/4", "2/4", "3/4", "3/4", "4/4"]


def test_without_any_limit_no_total_is_shown(tmp_path):
    seen = seen_in(tmp_path, max_epochs=-1, max_time={"seconds": 0}, **TRAINING)
    assert all(text.startswith("step ") and "/-- " in text for text in seen.batches)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_resumed_run_counts_on(tmp_path):
    def run(steps, **options):
        saved = ModelCheckpoint(tmp_path, every_n_train_steps=7, filename="stop")
        return seen_in(tmp_path, max_steps=steps, callbacks=[saved], limit_val_batches=0, **options)

    run(7)
    seen = run(12, ckpt_path=tmp_path / "stop.ckpt")
    assert seen.batches[0].startswith("step 8/12 ")
    assert seen.batches[-1].startswith("step 12/12 ")


def test_with_a_number_of_epochs_it_is_lightnings_bar(tmp_path):
    seen = seen_in(tmp_path, max_epochs=2, **TRAINING)
    words = [text.split() for text in seen.batches]
    assert [each[:2] for each in words] == [["Epoch", "0/1"]] * 5 + [["Epoch", "1/1"]] * 5
    assert [each[3] for each in words] == [f"{n}/5" for n in (1, 2, 3, 4, 5)] * 2


@pytest.mark.parametrize("bar", [TQDMProgressBar, type("Own", (RichProgressBar,), {})])
def test_a_bar_of_another_class_stays(bar):
    trainer = Trainer(callbacks=[bar()], logger=False, enable_checkpointing=False)
    use_step_progress_bar(trainer)
    assert type(trainer.progress_bar_callback) is bar


def test_a_trainer_without_a_bar_gets_none():
    trainer = Trainer(enable_progress_bar=False, logger=False, enable_checkpointing=False)
    use_step_progress_bar(trainer)
    assert trainer.progress_bar_callback is None
    assert not any(isinstance(each, StepProgressBar) for each in trainer.callbacks)
