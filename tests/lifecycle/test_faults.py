"""Bad numbers, a full disk, loggers that raise: said clearly, and nothing trained is lost."""

import csv
import errno
import math
import os
import re
import resource
import signal
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support.forks import exit_code
from support.networks import small_mlp
from support.points import Points
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    EMA,
    STF,
    Convergence,
    DiffusionModule,
    FrechetDistance,
    GradientVariance,
    LearnedProposal,
    ResidualMLP,
    SampleGrid,
    TargetVariance,
    TaylorCV,
)
from lightning_vr.callbacks import sample_grid as samples
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle import checkpoint_io
from lightning_vr.lifecycle.checkpoint_io import DurableCheckpointIO, UnwrittenCheckpointError
from lightning_vr.lifecycle.finite_guard import MOST_SKIPPED, FiniteGuard

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

SPOILT = 21


class Spoilt(Points):
    """Points, one of which is multiplied by ``bad`` once the first epoch has begun."""

    def __init__(self, bad):
        super().__init__(torch.randn(32, 2, generator=torch.Generator().manual_seed(0)))
        self.bad, self.is_armed = bad, False

    def __getitem__(self, i):
        batch = super().__getitem__(i)
        return batch | {"x0": batch["x0"] * self.bad} if self.is_armed and i == SPOILT else batch


class Arm(Callback):
    def on_train_batch_start(self, trainer, *args):
        trainer.train_dataloader.dataset.is_armed = True


ESTIMATORS = {
    "plain": dict,
    "batch": lambda: {"target": STF("batch")},
    "bank": lambda: {"target": STF(8)},
    "all": lambda: {"target": STF("all")},
    "carv": lambda: {"draws": CARV(2, LearnedProposal(bins=2))},
    "auto": lambda: {"draws": CARV("auto", pilot_every_n_steps=1)},
    "taylor": lambda: {"control_variate": TaylorCV(bins=2, gate="open", refit_every_n_steps=1)},
}


def module(estimator="plain", **options):
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)} | options
    return DiffusionModule(small_mlp(std=0.3), **ESTIMATORS[estimator](), **options)


def trainer(*callbacks, **options):
    settings = {
        "max_epochs": 2,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "log_every_n_steps": 1,
    }
    return quiet_trainer(*callbacks, **(settings | options))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """A folder for what goes to the working directory where no logger has one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture
def points():
    # the spoilt one is in the third of four batches
    return DataLoader(Spoilt(torch.nan), batch_size=8)


class Weights(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(nn.utils.parameters_to_vector(module.parameters()).detach().clone())


@pytest.mark.usefixtures("no_pictures")
class TestNonFinite:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_a_bad_sample_stops_with_its_index_noise_level_and_step(self, estimator, points):
        kept = Weights()
        with pytest.raises(ValueError, match="Optimizer step 2 met a number") as error:
            trainer(Arm(), kept).fit(module(estimator), points)
        words = str(error.value)
        assert f"sample {SPOILT}, noise level " in words
        assert "batch 0 of the step, is not finite: remove it from the data" in words
        assert float(re.search(r"noise level ([\d.e+-]+)", words)[1]) > 0
        assert kept.seen[-1].isfinite().all()

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_skipping_makes_every_step_but_the_bad_ones(self, estimator, points, tmp_path):
        kept = Weights()
        watch = [TargetVariance(references=[4], noise_levels=3, samples=64)]
        watch += [GradientVariance(every_n_steps=1, samples=4, noise_levels=2), EMA(decay=0.5)]
        watch = [] if estimator == "auto" else watch
        model = module(estimator, on_nonfinite="skip")
        fit = trainer(kept, *watch, Arm(), logger=CSVLogger(tmp_path))
        with pytest.warns(match=f"sample {SPOILT}.*The step is left out"):
            fit.fit(model, points)
        moved = [not torch.equal(a, b) for a, b in zip(kept.seen, kept.seen[1:], strict=False)]
        assert moved == [True, False, True, True, True, False, True]
        assert all(bool(weights.isfinite().all()) for weights in kept.seen)
        assert fit.logged_metrics["train/skipped_steps"] == 2
        assert all(bool(x.isfinite().all()) for x in tensors_of(model.state_dict()))
        for callback in watch:
            assert "nan" not in str(callback.state_dict().get("removed", ""))

    @pytest.mark.parametrize("fused", [False, True])
    def test_skipping_goes_with_an_optimizer_that_takes_scaled_gradients(self, fused, points):
        options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused)}
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        fit = trainer(Arm(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        model = module(on_nonfinite="skip", **options)
        with pytest.warns(match="The step is left out"):
            fit.fit(model, points)
        assert int(fit.callback_metrics["train/skipped_steps"]) == 2
        assert all(p.isfinite().all() for p in model.parameters())

    def test_the_count_goes_on_after_a_resume(self, points, tmp_path):
        saved = ModelCheckpoint(tmp_path, save_last=True)
        model = module(on_nonfinite="skip")
        with pytest.warns(match="The step is left out"):
            trainer(Arm(), saved, max_epochs=1).fit(model, points)
        again = module(on_nonfinite="skip")
        fit = trainer(Arm(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
        fit.fit(again, points, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        assert fit.logged_metrics["train/skipped_steps"] == 2

    def test_in_an_accumulation_window_the_bad_batch_is_named(self, points):
        with pytest.raises(ValueError, match=f"step 0 met.*sample {SPOILT}.*batch 2 of the step"):
            trainer(Arm(), accumulate_grad_batches=4).fit(module(), points)

    def test_a_loss_that_overflows_is_told_from_a_bad_sample(self):
        class Spoil(Callback):
            def on_train_batch_start(self, trainer, module, *args):
                module.network.project_out.bias.data.fill_(1e30)

        with pytest.raises(ValueError, match="has a loss that is not: lower the learning rate"):
            trainer(Spoil()).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))

    @pytest.mark.parametrize("action", ["raise", "skip"])
    def test_a_weight_that_is_not_finite_is_named_before_any_sample(self, action, tmp_path):
        class Spoil(Callback):
            def on_train_batch_end(self, trainer, module, *args):
                if trainer.global_step == 3:
                    module.network.project_out.bias.data[1] = torch.nan

        saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
        fit = trainer(Spoil(), saved)
        name = "the weight `network.project_out.bias`"
        with (
            pytest.warns(UserWarning, match=f"could not be written .{name} is not finite"),
            pytest.raises(ValueError, match=f"step 3 met a number that is not finite: {name}"),
        ):
            fit.fit(module(on_nonfinite=action), DataLoader(Spoilt(1.0), batch_size=8))
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2

    def test_a_weight_that_the_last_step_breaks_is_an_error(self):
        class Spoil(Callback):
            def on_train_batch_end(self, trainer, module, *args):
                if trainer.global_step == 8:
                    module.network.project_out.bias.data[1] = torch.inf

        with pytest.raises(ValueError, match=r"last optimizer step left .*project_out\.bias"):
            trainer(Spoil()).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))

    def test_running_statistics_that_a_skipped_sample_breaks_are_named_with_it(self):
        network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        network.forward = lambda x, t: nn.Sequential.forward(network, x)
        model = DiffusionModule(network, on_nonfinite="skip")
        with pytest.raises(ValueError, match=f"`network.1.running_mean`.*sample {SPOILT}, noise"):
            trainer(Arm()).fit(model, DataLoader(Spoilt(torch.nan), batch_size=8))

    @pytest.mark.parametrize("bad", range(MOST_SKIPPED - 1, MOST_SKIPPED + 2))
    def test_skipping_ends_with_more_steps_in_a_row_than_are_an_accident(self, bad):
        class Fail(Callback):
            def on_after_backward(self, trainer, module):
                # one good step between two rows of bad ones
                if seen["steps"] % (bad + 1):
                    module.network.project_out.bias.grad.fill_(torch.nan)
                seen["steps"] += 1

        seen, model = {"steps": 0}, module(on_nonfinite="skip")
        fit = trainer(Fail(), max_epochs=-1, max_steps=2 * (bad + 1) + 1, limit_val_batches=0)
        data = DataLoader(Spoilt(1.0), batch_size=8)
        too_many = pytest.raises(ValueError, match=f"so in {bad} steps in a row")
        with (
            pytest.warns(match="the gradient of `network.project_out.bias`"),
            nullcontext() if bad <= MOST_SKIPPED else too_many,
        ):
            fit.fit(model, data)
        assert fit.callback_metrics["train/skipped_steps"] == (
            2 * bad if bad <= MOST_SKIPPED else MOST_SKIPPED
        )

    @pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
    def test_a_loss_that_is_not_finite_counts_where_its_gradient_is(self, precision):
        class Saturated(DiffusionModule):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                is_bad = self.global_step == 2
                # infinite, and its gradient is that of a constant
                return torch.where(torch.tensor(is_bad), torch.inf, loss)

        plugins = []
        if precision == "16-mixed":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        model, kept = Saturated(small_mlp(std=0.3), on_nonfinite="skip"), Weights()
        fit = trainer(kept, plugins=plugins, max_epochs=1)
        with pytest.warns(match="Optimizer step 2 met"):
            fit.fit(model, DataLoader(Spoilt(1.0), batch_size=8))
        moved = [not torch.equal(a, b) for a, b in zip(kept.seen, kept.seen[1:], strict=False)]
        assert moved == [True, False, True]

    def test_gradients_that_overflow_float16_at_every_scale_end_the_run(self):
        class Overflow(Callback):
            def on_after_backward(self, trainer, module):
                module.network.project_out.bias.grad.fill_(torch.inf)

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        fit = trainer(Overflow(), plugins=plugins, max_epochs=100, limit_val_batches=0)
        with pytest.raises(ValueError, match=r"overflow float16.* ever smaller loss scales"):
            fit.fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        assert fit.global_step == 41

    @pytest.mark.parametrize("action", ["raise", "skip"])
    @pytest.mark.parametrize("watch", ["target", "distance"])
    def test_what_reads_the_training_set_names_a_bad_sample_or_leaves_it_out(
        self, action, watch, caplog
    ):
        callback = TargetVariance(references=[4], noise_levels=3, samples=64)
        callback = callback if watch == "target" else FrechetDistance(samples=8)
        data = Spoilt(torch.nan)
        data.is_armed = True
        model, plain = module(on_nonfinite=action), DataLoader(Spoilt(1.0), batch_size=8)
        fit = trainer(callback, max_epochs=1, limit_train_batches=2)
        if action == "raise":
            with pytest.raises(ValueError, match=f"sample {SPOILT} of the training set is not"):
                fit.fit(model, DataLoader(data, batch_size=8), plain)
        else:
            fit.fit(model, DataLoader(data, batch_size=8), plain)
            assert f"leaves out sample {SPOILT} of the training set" in caplog.text
            assert watch != "target" or callback.curve.size == 31

    def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_named(self):
        class Spoil(Callback):
            def on_after_backward(self, trainer, module):
                module.network.project_out.bias.grad.fill_(torch.nan)

        with pytest.raises(ValueError, match=r"gradient of `network\.project_out\.bias`, though"):
            trainer(Spoil()).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))

    def test_a_condition_that_is_not_finite_counts_as_the_sample(self):
        class Conditional(DiffusionModule):
            def encode(self, batch):
                clean = super().encode(batch)
                bad = torch.where(clean.index == SPOILT, torch.nan, 0.0)
                return type(clean)(clean.x0, cond={"shift": bad[:, None]}, index=clean.index)

            def predict(self, x, noised):
                return self.network(x, noised.t) + noised.cond["shift"]

        model = Conditional(ResidualMLP(2, width=8, depth=1))
        with pytest.raises(ValueError, match=f"sample {SPOILT}.*is not finite"):
            trainer().fit(model, DataLoader(Spoilt(1.0), batch_size=8))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize(("value", "is_finite"), [(6e4, True), (math.nan, False)])
    def test_the_norm_does_not_overflow_in_16_bits(self, dtype, value, is_finite):
        layer = nn.Linear(30, 30, dtype=dtype)
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, 6e4)
        layer.bias.grad[3] = value
        trainer = SimpleNamespace(precision_plugin=None, global_step=5)
        guard = FiniteGuard("skip")
        if is_finite:
            assert guard.check(trainer, layer)
        else:
            with pytest.warns(UserWarning, match="step 5 .* the gradient of `bias`"):
                assert not guard.check(trainer, layer)

    def test_a_bad_choice_is_refused(self):
        with pytest.raises(ValueError, match="must be 'raise' or 'skip', got 'ignore'"):
            module(on_nonfinite="ignore")


def tensors_of(state):
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors_of(value)
        elif isinstance(value, torch.Tensor):
            yield value


class NewNames(Callback):
    """Logs numbers whose names change with every other step."""

    def on_train_batch_end(self, trainer, *args):
        trainer.logger.log_metrics({f"number_{trainer.global_step // 2}": 1.5}, trainer.global_step)


class TestCSVLog:
    @pytest.fixture
    def end(self, monkeypatch):
        """What to do in the middle of writing rows, and of which."""
        end, write = SimpleNamespace(of=lambda rows: False, by=None), csv.DictWriter.writerows

        def writerows(writer, rows):
            rows = list(rows)
            if end.of(rows):
                writer.writer.writerow(["half"])
                end.by()
            write(writer, rows)

        monkeypatch.setattr(csv.DictWriter, "writerows", writerows)
        return end

    @staticmethod
    def rows(folder):
        logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
        trainer(NewNames(), logger=logger).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))

    @pytest.mark.parametrize("step", [4, 5], ids=["more columns", "as many"])
    def test_rows_that_a_full_disk_does_not_take_come_with_the_next(self, tmp_path, end, step):
        def no_room():
            raise OSError(errno.ENOSPC, "No space left on device")

        expected = self.rows(tmp_path / "whole")
        end.of, end.by = lambda rows: rows[-1]["step"] == step, no_room
        with pytest.warns(match="`CSVLogger.* failed .*No space left.*training goes on"):
            assert self.rows(tmp_path / "full") == expected
        assert len(expected) > 8

    def test_a_process_that_ends_while_it_writes_more_columns_leaves_the_rows_before(
        self, tmp_path, end
    ):
        end.of, end.by = lambda rows: len(rows) > 3, lambda: os._exit(9)
        assert exit_code(lambda: self.rows(tmp_path), seconds=60) == 9
        rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
        assert {row["step"] for row in rows} >= {"1", "2", "3"}
        assert all(float(row["number_1"]) == 1.5 for row in rows if row["number_1"])


def disk_without_room(monkeypatch, folder):
    """Let no file be written below a folder."""
    opened = Path.open

    def no_room(path, mode="r", *args, **kwargs):
        if "w" in mode and folder in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", no_room)


def same_weights(state, model):
    return all(bool((state[name] == p.cpu()).all()) for name, p in model.named_parameters())


class TestFullDisk:
    @pytest.fixture
    def full(self, monkeypatch):
        """A disk that is full for the checkpoints of some steps: half is written, then no more."""
        steps, save = set(), torch.save

        def write(checkpoint, file, *args):
            if isinstance(checkpoint, dict) and checkpoint.get("global_step") in steps:
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(checkpoint, file, *args)

        monkeypatch.setattr(torch, "save", write)
        return steps

    def test_training_goes_on_and_the_last_good_checkpoint_stays(self, full, tmp_path, monkeypatch):
        # nor is there room for the last one elsewhere
        full |= {6, 8}
        saved = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, save_top_k=1)
        data = DataLoader(Spoilt(1.0), batch_size=8)
        model = module()
        fit = trainer(saved, limit_val_batches=0)
        with (
            pytest.warns(match="could not be written.*No space left.*training goes on"),
            pytest.raises(UnwrittenCheckpointError, match="checkpoint before it is lost"),
        ):
            fit.fit(model, data)
        assert fit.global_step == 8
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "epoch=0-step=4.ckpt",
            "last.ckpt",
        ]
        for path in tmp_path.iterdir():
            assert torch.load(path, weights_only=True)["global_step"] == 4
        full.clear()
        saved = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, save_top_k=1)
        again = trainer(saved, limit_val_batches=0)
        again.fit(module(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        for name, weights in again.lightning_module.state_dict().items():
            assert torch.equal(weights, model.state_dict()[name]), name

    def test_a_link_to_the_last_checkpoint_leads_to_one_that_was_written(self, full, tmp_path):
        full |= {6, 8}
        saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last="link")
        with (
            pytest.warns(match="could not be written.*No space left.*training goes on"),
            pytest.raises(UnwrittenCheckpointError, match="checkpoint before it is lost"),
        ):
            trainer(saved, limit_val_batches=0).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4

    def test_a_link_to_the_last_checkpoint_leads_to_one_at_each_moment(self, tmp_path, monkeypatch):
        def remove(path):
            remove_at_once(path)
            led_to.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])

        led_to, remove_at_once = [], checkpoint_io.remove_at_once
        monkeypatch.setattr(checkpoint_io, "remove_at_once", remove)
        saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last="link")
        trainer(saved, limit_val_batches=0).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        assert led_to == [4, 6, 8]
        assert sorted(each.name for each in tmp_path.iterdir()) == [
            "epoch=1-step=8.ckpt",
            "last.ckpt",
        ]

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    def test_a_disk_that_stays_full_is_an_error_at_the_end_that_names_another_place(
        self, tmp_path, monkeypatch
    ):
        class Ended(Callback):
            def on_fit_end(self, trainer, module):
                ended.append(trainer.global_step)

        ended, full, elsewhere, model = [], tmp_path / "full", tmp_path / "elsewhere", module()
        disk_without_room(monkeypatch, full)
        monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
        saved = ModelCheckpoint(full, every_n_train_steps=2, save_last=True)
        fit = trainer(saved, Ended(), default_root_dir=full, limit_val_batches=0)
        data = DataLoader(Spoilt(1.0), batch_size=8)
        path = elsewhere / "unsaved-step=8.ckpt"
        with (
            pytest.warns(match="could not be written .*No space left.*training goes on"),
            pytest.raises(
                UnwrittenCheckpointError, match=f"last.ckpt, .*No space left.* is in {path}"
            ),
        ):
            fit.fit(model, data)
        assert ended == [8]
        assert same_weights(torch.load(path, weights_only=True)["state_dict"], model)
        again = module()
        trainer(max_epochs=2).fit(again, data, ckpt_path=path, weights_only=True)
        assert same_weights(again.state_dict(), model)

    @pytest.mark.parametrize("error", [RuntimeError("stop"), SIGTERMException()])
    def test_what_an_error_ends_on_a_full_disk_is_saved_elsewhere(
        self, error, tmp_path, monkeypatch
    ):
        class Stop(Callback):
            def on_train_batch_start(self, trainer, *args):
                if trainer.global_step == 5:
                    raise error

        full, elsewhere = tmp_path / "full", tmp_path / "elsewhere"
        disk_without_room(monkeypatch, full)
        monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
        saved = ModelCheckpoint(full, every_n_train_steps=2, save_on_exception=True)
        fit = trainer(saved, Stop(), default_root_dir=full, limit_val_batches=0)
        with (
            pytest.warns(match=f"what was trained is in {elsewhere}/unsaved-step=5.ckpt"),
            pytest.warns(match="could not be written .*: training goes on"),
            pytest.warns(match="could not be written .*: the run ends"),
            pytest.raises(type(error)),
        ):
            fit.fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        assert torch.load(elsewhere / "unsaved-step=5.ckpt", weights_only=True)["global_step"] == 5

    def test_nothing_is_said_where_a_later_write_succeeded(self, full, tmp_path):
        full |= {6}
        saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=1)
        with pytest.warns(match="could not be written"):
            trainer(saved, limit_val_batches=0).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        assert [path.name for path in tmp_path.iterdir()] == ["epoch=1-step=8.ckpt"]

    def test_a_disk_with_room_does_not_make_up_for_one_without(self, tmp_path, monkeypatch):
        full, roomy = tmp_path / "full", tmp_path / "roomy"
        disk_without_room(monkeypatch, full)
        savers = ModelCheckpoint(full, "best", every_n_train_steps=2), ModelCheckpoint(roomy)
        fit = trainer(*savers, default_root_dir=roomy, limit_val_batches=0)
        with (
            pytest.warns(match="could not be written"),
            pytest.raises(UnwrittenCheckpointError, match=f"{full}/best.*ckpt, could not"),
        ):
            fit.fit(module(), DataLoader(Spoilt(1.0), batch_size=8))

    def test_what_was_kept_goes_once_there_is_room_again(self, full, tmp_path):
        full |= {4}
        saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=1)
        with pytest.warns(match="could not be written"):
            trainer(saved, limit_val_batches=0).fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        assert [path.name for path in tmp_path.iterdir()] == ["epoch=1-step=8.ckpt"]

    def test_the_best_stays_while_what_is_better_is_not_written(self, full, tmp_path):
        files, (worse, better, best, last) = DurableCheckpointIO(), (tmp_path / n for n in "abcd")
        files.save_checkpoint({"global_step": 4}, worse)
        full |= {6}
        with pytest.warns(match="could not be written"):
            files.save_checkpoint({"global_step": 6}, better)
        files.remove_checkpoint(worse)
        full.clear()
        files.save_checkpoint({"global_step": 6}, last)
        assert worse.exists()
        files.save_checkpoint({"global_step": 8}, best)
        files.remove_checkpoint(better)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]

    def test_a_checkpoint_that_is_saved_after_training_fails_as_usual(self, full, tmp_path):
        fit = trainer(max_epochs=1)
        fit.fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        full |= {4}
        with pytest.raises(OSError, match="No space left"):
            fit.save_checkpoint(tmp_path / "end.ckpt")

    def test_what_is_left_of_a_write_is_taken_for_no_checkpoint(self, tmp_path, monkeypatch):
        names, save = [], torch.save

        def write(checkpoint, file):
            names.append(Path(file.name).name)
            save(checkpoint, file)

        monkeypatch.setattr(torch, "save", write)
        DurableCheckpointIO().save_checkpoint({}, tmp_path / "hpc_ckpt_2.ckpt")
        # SLURM restarts from the highest number of a name with this in it
        assert not [name for name in names if "ckpt" in name]

    def test_a_write_beyond_a_real_limit_leaves_the_file_as_it_was(self, tmp_path):
        path = tmp_path / "last.ckpt"
        DurableCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)

        def write():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            with pytest.warns(match="could not be written"):
                DurableCheckpointIO().save_checkpoint({"weights": torch.ones(10**6)}, path)

        assert exit_code(write, seconds=60) == 0
        assert torch.equal(torch.load(path)["weights"], torch.ones(3))
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def test_what_is_no_matter_of_the_disk_is_raised(self, tmp_path):
        with pytest.raises(AttributeError, match="Can't pickle local object"):
            DurableCheckpointIO().save_checkpoint({"f": lambda: 0}, tmp_path / "last.ckpt")
        assert not list(tmp_path.iterdir())

    def test_a_checkpoint_io_of_the_users_own_stays(self):
        own = AsyncCheckpointIO()
        fit = trainer(plugins=[own], max_epochs=1, limit_val_batches=0)
        fit.fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
        assert fit.strategy.checkpoint_io is own


class Raising(Logger):
    """A logger that fails at everything."""

    name, version = "raising", 0

    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no route")

    def log_hyperparams(self, *args, **kwargs):
        raise ConnectionError("no route")

    def log_image(self, *args, **kwargs):
        raise ConnectionError("no route")

    def save(self):
        raise ConnectionError("no route")

    def finalize(self, status):
        raise ConnectionError("no route")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore:.*failed .ConnectionError")
def test_a_logger_that_raises_ends_no_run_and_the_others_get_everything(tmp_path):
    good = CSVLogger(tmp_path, name="good")
    fit = trainer(
        TargetVariance(references=[4], noise_levels=3, samples=64),
        Convergence(noise_levels=3, samples=16),
        SampleGrid(4),
        logger=[Raising(), good],
        max_epochs=1,
    )
    fit.fit(module(), EightGaussians(16, num_samples=64, num_validation=16))
    assert fit.global_step == 4
    text = (tmp_path / "good/version_0/metrics.csv").read_text()
    assert "train/loss" in text
    assert "convergence/loss" in text


def test_a_failing_logger_is_told_of_once_for_each_of_its_methods(recwarn):
    fit = trainer(logger=Raising(), max_epochs=2, limit_val_batches=0)
    fit.fit(module(), DataLoader(Spoilt(1.0), batch_size=8))
    told = [str(w.message) for w in recwarn if "no route" in str(w.message)]
    assert len(told) == len(set(told))
    assert any("`Raising.log_metrics` failed (ConnectionError: no route)" in each for each in told)


def test_after_training_a_logger_that_raises_is_an_error_again():
    logger, data = Raising(), EightGaussians(16, num_samples=64, num_validation=16)
    fit = trainer(logger=logger, max_epochs=1)
    with pytest.warns(match="failed .ConnectionError"):
        fit.fit(module(), data)
    with pytest.raises(ConnectionError):
        fit.validate(module(), data, verbose=False)
    with pytest.warns(match="failed .ConnectionError"):
        trainer(logger=logger, max_epochs=1).fit(module(), data)


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(samples, "save_picture", broken)
    fit = trainer(SampleGrid(4), logger=CSVLogger(tmp_path), max_epochs=1)
    with pytest.warns(match=r"The samples .* could not be written .*: training goes on"):
        fit.fit(module(), EightGaussians(16, num_samples=64, num_validation=16))
    assert fit.global_step == 4


def test_outside_of_training_a_broken_picture_is_an_error(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(samples, "save_picture", broken)
    model, data = module(), EightGaussians(16, num_samples=64, num_validation=16)
    fit = trainer(SampleGrid(4), logger=CSVLogger(tmp_path), max_epochs=1)
    with pytest.raises(OSError, match="No space left"):
        fit.test(model, data)
