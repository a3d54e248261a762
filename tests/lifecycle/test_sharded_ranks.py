"""Runs whose weights are sharded over two ranks, against DDP."""

import math

import pytest
import torch
from lifecycle.sharded_runs import (
    CHUNKED,
    COMPOSED,
    FACTORS,
    SGD,
    BreakGradient,
    Shared,
    SlowToEncode,
    averages,
    build,
    fit,
    is_allowed,
    steps,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from support.comparisons import assert_equal
from support.compilers import Compiled
from support.covering_arrays import covering_array
from support.ranks import launch
from support.selections import mostly_slow
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    AuditDuringTraining,
    DiffusionModule,
    FrechetDistance,
    GradientSignal,
    GradientVariance,
    ResidualMLP,
    TaylorCV,
)
from lightning_vr.core.distributed import SynchronizedError
from lightning_vr.lifecycle import sharded_checkpoints
from lightning_vr.lifecycle.checkpoint_io import UnwrittenCheckpointError
from lightning_vr.lifecycle.checkpoints import read_checkpoint
from lightning_vr.pipelines import to_pipeline

pytestmark = [
    pytest.mark.usefixtures("no_pictures_in_module"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

# sums over ranks in another order
ROUNDING = {"rtol": 0, "atol": 1e-6}
ROWS = covering_array(FACTORS, 3, is_allowed)
"""Each combination of three settings: of draws, target and accumulation, for example."""


def weights_by_strategy(rows):
    for row in rows:
        found = []
        for how in ("ddp", "file"):
            module = build(row, optimizer=SGD)  # Adam magnifies rounding of small gradients
            start = weights(module)
            fit(how, module, *([averages()] if row["averages"] else []), **steps(row))
            found.append(weights(module))
            assert not torch.equal(found[-1], start), row
        torch.testing.assert_close(*found, **ROUNDING, msg=lambda x: f"{row}: {x}")  # noqa: B023


@pytest.mark.parametrize(
    "rows", [pytest.param(ROWS, marks=pytest.mark.slow), [COMPOSED]], ids=["many", "one"]
)
def test_weights_of_sharded_training_are_those_of_ddp(rows):
    launch(lambda _: weights_by_strategy(rows), 2)


class Shorten(Callback):
    """Leaves the last rank a few rows of each batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank > 0:
            for name in batch:
                batch[name] = batch[name][:4]


def weights_by_rows(folder):
    """One rank has several chunks of draws, the other fewer draws than a chunk."""
    found = []
    for how, start in (("ddp", None), ("file", None), ("folder", folder / "end.ckpt")):
        torch.manual_seed(0)
        module = build(CHUNKED, optimizer=SGD, network=Shared())
        where = {} if start is None else {"ckpt_path": start}
        trainer = fit(how, module, Shorten(), averages(), max_steps=3 if start else 2, **where)
        trainer.save_checkpoint(folder / "end.ckpt")
        found.append(weights(module))
    torch.testing.assert_close(*found[:2], **ROUNDING)
    assert not torch.equal(*found[1:])


def test_ranks_may_have_other_numbers_of_rows_and_weights_several_names(tmp_path):
    launch(lambda _: weights_by_rows(tmp_path), 2)
    saved = read_checkpoint(tmp_path / "end.ckpt")
    for state in (saved["state_dict"], saved["current_model_state"]):
        assert torch.equal(state["network.first.weight"], state["network.last.weight"])


def stop(how, path, hook="on_train_batch_end", count=3):
    """Stop within a window of accumulated gradients, or elsewhere."""
    with pytest.raises(StoppedError):
        fit(how, build(COMPOSED), averages(), StopAt(hook, count, path), **steps(COMPOSED))


def resume(how, path, ranks=2):
    module = build(COMPOSED)
    trainer = fit(how, module, averages(), ckpt_path=path, ranks=ranks, **steps(COMPOSED))
    return module, trainer


def resumed(folder, saved, others):
    whole = build(COMPOSED)
    fit(saved, whole, averages(), **steps(COMPOSED))
    expected = weights(whole)
    module, trainer = resume(saved, folder / "stop.ckpt")
    assert torch.equal(weights(module), expected)
    trainer.save_checkpoint(folder / "end.ckpt")
    for how in others:
        module, _ = resume(how, folder / "stop.ckpt")
        torch.testing.assert_close(weights(module), expected, rtol=1e-4, atol=1e-5)
    if torch.distributed.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


@pytest.mark.parametrize(
    ("saved", "others"),
    [
        ("folder", []),
        pytest.param("file", ["ddp"], marks=pytest.mark.slow),
        pytest.param("folder", ["ddp", "file"], marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_resumes_exactly_from_a_file_and_from_a_folder(saved, others, tmp_path):
    launch(lambda _: stop(saved, tmp_path / "stop.ckpt"), 2)
    launch(lambda _: resumed(tmp_path, saved, others), 2)

    expected, path = torch.load(tmp_path / "expected.pt"), tmp_path / "end.ckpt"
    assert torch.equal(weights(DiffusionModule.load_from_checkpoint(path)), expected)
    requests = DataLoader([{"index": torch.tensor(i)} for i in range(2)], batch_size=2)
    predicted = build(COMPOSED)
    quiet_trainer().predict(predicted, requests, ckpt_path=path, weights_only=True)
    assert torch.equal(weights(predicted), expected)

    assert path.is_file() == (saved == "file")
    if saved == "folder":
        assert sorted(each.name for each in path.iterdir()) == ["meta.pt", "rank-0.pt", "rank-1.pt"]
        (path / "rank-1.pt").unlink()
        with pytest.raises(ValueError, match=r"the folder .* lacks rank-1.pt"):
            read_checkpoint(path)


KEPT = ("state_dict", "current_model_state", "optimizer_states", "averaging_state")


def save_at(how, path, hook, ranks, **options):
    """Stop at the end of an epoch, or before the first batch."""
    with pytest.raises(StoppedError):
        fit(how, build(COMPOSED), averages(), StopAt(hook, 1, path), ranks=ranks, **options)


def check_same_state(saved, again):
    before, after = read_checkpoint(saved), read_checkpoint(again)
    for part in KEPT:
        assert_equal(after[part], before[part], part)
    assert after["global_step"] == before["global_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "folder"])
def test_between_epochs_another_number_of_ranks_goes_on_from_the_same_state(how, tmp_path):
    two, one = tmp_path / "two.ckpt", tmp_path / "one.ckpt"
    end, begin = ("on_train_epoch_end", "on_train_batch_start")
    launch(lambda _: save_at(how, two, end, 2, max_steps=20), 2)
    save_at("auto", tmp_path / "two-on-one.ckpt", begin, 1, ckpt_path=two, max_steps=20)
    check_same_state(two, tmp_path / "two-on-one.ckpt")

    save_at("auto", one, end, 1, max_steps=20)
    launch(
        lambda _: save_at(how, tmp_path / "one-on-two.ckpt", begin, 2, ckpt_path=one, max_steps=20),
        2,
    )
    check_same_state(one, tmp_path / "one-on-two.ckpt")


def watched(rank):
    """A run is the same with and without callbacks that sample and measure."""
    found = []
    measure = [FrechetDistance(samples=40), GradientVariance(every_n_steps=2, noise_levels=2)]
    options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    for callbacks in ([], measure):
        module = build(CHUNKED)
        trainer = fit("file", module, *callbacks, max_steps=3, **options)
        found.append(weights(module))
    assert torch.equal(*found)
    metrics = trainer.callback_metrics
    (distance,) = (x for name, x in metrics.items() if name.startswith("frechet_distance/"))
    assert math.isfinite(distance), list(metrics)
    assert metrics["gradient_variance/total"] > 0
    requests = [{"index": torch.tensor(i)} for i in range(3)]  # ranks have other numbers of batches
    predicted = trainer.predict(module, DataLoader(requests, batch_size=1))
    assert all(bool(x.isfinite().all()) for x in predicted)
    with pytest.raises(ValueError, match="save a checkpoint, and export what"):
        to_pipeline(module)
    with pytest.raises(ValueError, match="that an earlier fit has sharded: save a checkpoint"):
        fit("ddp", module)

    with pytest.raises(SynchronizedError, match=r"the gradient of `network\.\S+`, though every"):
        fit("file", build(), BreakGradient(rank=1))


def test_callbacks_and_the_guard_work_on_sharded_weights():
    launch(watched, 2)


def chosen_by_pilots(rank):
    slow = build(kind=SlowToEncode, draws=CARV("auto"))
    fit("file", slow)
    assert slow.draws.chosen > 1


@pytest.mark.slow
def test_pilots_work_on_sharded_weights():
    launch(chosen_by_pilots, 2)


def compiled(rank):
    """A network that is compiled in place trains and samples as one that is not."""
    found = []
    for is_compiled in (False, True):
        module = build(CHUNKED, optimizer=SGD)
        if is_compiled:
            module.network.compile(backend=Compiled.backend)
        fit("file", module, averages(), **steps(COMPOSED))
        assert bool(Compiled.calls) == is_compiled
        found.append((weights(module), module.sample(3, seed=0)))
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, **ROUNDING)


@pytest.mark.slow
def test_a_compiled_network_is_sharded():
    launch(compiled, 2)


def wrapped():
    return build(network=torch.compile(ResidualMLP(2, width=16), backend="eager"))


class Batched(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8))
        self.layers.append(torch.nn.Linear(8, 2))

    def forward(self, x, t):
        return self.layers(x)


def scaled():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


REFUSED = {
    "taylor": (lambda: build(control_variate=TaylorCV()), (), r"must be TaylorCV\(order=0\) with"),
    "copy": (build, [EMAWeightAveraging()], "must not hold EMAWeightAveraging .* lightning_vr.EMA"),
    "audit": (build, [AuditDuringTraining()], "AuditDuringTraining needs whole gradients"),
    "signal": (build, [GradientSignal()], "GradientSignal needs whole gradients .* or DDP"),
    "wrapped": (wrapped, (), "`network` must be compiled in place"),
    "statistics": (lambda: build(network=Batched()), (), "must keep no statistics of batches"),
    "scaled": (build, (), "`precision` must need no loss scale", scaled()),
}


def refused(case):
    make, callbacks, message, *options = case
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit("file", make(), *callbacks, **dict(*options))


@pytest.mark.parametrize("name", mostly_slow(list(REFUSED), ["taylor"]))
def test_what_needs_whole_weights_is_refused(name):
    launch(lambda _: refused(REFUSED[name]), 2)


def saved_twice(folder):
    saver = ModelCheckpoint(folder, filename="{step}", save_last=True, every_n_train_steps=2)
    fit("folder", build(), saver, enable_checkpointing=True)


def full_disk(folder):
    """The second checkpoint cannot be written, on one rank alone."""
    write = sharded_checkpoints._write

    def write_once(state, path):
        if "partial" in str(path) and path.name == "rank-1.pt" and (folder / "last.ckpt").exists():
            raise OSError("no space")
        write(state, path)

    sharded_checkpoints._write = write_once
    with pytest.raises(UnwrittenCheckpointError, match="no space") as error:
        saved_twice(folder)
    elsewhere = str(error.value).split("what was trained is in ")[1].split(": move")[0]
    assert read_checkpoint(elsewhere)["global_step"] == 4


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    launch(lambda _: saved_twice(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=4.ckpt"]
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The checkpoint .* could not be written")
def test_a_folder_that_one_rank_cannot_write_replaces_none(tmp_path):
    launch(lambda _: full_disk(tmp_path), 2)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2
