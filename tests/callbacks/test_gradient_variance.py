"""GradientVariance in a run: what it leaves alone, whether its numbers agree, what it writes."""

import copy
import csv
import functools
import math
import random
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foreign_trainers import (
    DDPM,
    GAN,
    Classifier,
    LeastSquares,
    critic_loss,
    ddpm_loss,
    labelled,
    normal_points,
    pictures,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from PIL import Image
from support.compilers import Compiled
from torch import nn

from lightning_vr import EMA, STF, VP, DiffusersSchedule, DiffusionModule, ResidualMLP
from lightning_vr.callbacks import gradient_variance_report as report
from lightning_vr.callbacks.gradient_probes import GradientProbe
from lightning_vr.callbacks.gradient_variance import GradientVariance
from lightning_vr.callbacks.target_variance import TargetVariance
from lightning_vr.data import EightGaussians
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_statistics import GradientStatistics

pytestmark = pytest.mark.usefixtures("no_pictures")

PARTS = ("data", "timestep", "noise")


def trainer(folder, *callbacks, **settings):
    defaults = {
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": CSVLogger(folder, name="", version=""),
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def diffusion(target=None, compiled=False):
    torch.manual_seed(0)
    network = ResidualMLP(width=16, depth=1)
    return DiffusionModule(
        torch.compile(network, backend=Compiled.backend) if compiled else network,
        target=target,
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
    )


def gaussians(**settings):
    return EightGaussians(
        **({"batch_size": 16, "num_samples": 64, "num_validation": 16} | settings)
    )


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def averaging():
    return EMA(decay=0.5)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def logged(folder):
    """The last value of each number of the gradient's variance, and all its names."""
    found = {}
    for row in rows(folder / "metrics.csv"):
        found |= {k: float(v) for k, v in row.items() if k.startswith("gradient_") and v}
    return {name.removeprefix("gradient_variance/"): value for name, value in found.items()}


def last_rows(folder):
    """The rows of the last step in the file, as numbers that are known, by kind and name."""
    table = rows(folder / "gradient_variance.csv")
    return {
        (row["of"], row["name"]): {
            k: float(v) for k, v in row.items() if k not in ("of", "name") and v != "nan"
        }
        for row in table
        if row["step"] == table[-1]["step"]
    }


OURS = ("gradient_variance", "target_variance")


def own_metrics(folder):
    """What the module itself has logged, event by event."""
    events = []
    for row in rows(folder / "metrics.csv"):
        own = {k: v for k, v in row.items() if v and not k.startswith(OURS)}
        if set(own) - {"step"}:
            events.append(sorted(own.items()))
    return events


def everything(value):
    """A copy of nested values in which tensors are lists, so that ``==`` is bitwise."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {k: everything(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [everything(v) for v in value]
    return value


def outcome(make, data, folder, callbacks, epochs=2, resume=None, **options):
    """All that a run leaves: weights, buffers, optimizers, metrics, lists, random states."""
    module = make()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(epochs)
    fit = trainer(folder, *callbacks, max_epochs=epochs, **options)
    fit.fit(module, data(), ckpt_path=resume, weights_only=True)
    if resume is None:
        fit.save_checkpoint(folder / "end.ckpt")
    metric = getattr(module, "accuracy", None)
    left = {
        "weights": module.state_dict(),  # averaged ones, where a callback averages
        "optimizers": [o.state_dict() for o in fit.optimizers],
        "metrics": own_metrics(folder),
        "callback metrics": {k: v for k, v in fit.callback_metrics.items() if "/" not in k},
        "accuracy": metric and [metric.tp, metric.fp, metric.tn, metric.fn, metric.update_count],
        "own": [getattr(module, "steps", None), len(getattr(module, "outputs", []))],
        "gradients": [p.grad for p in module.parameters()],
        "needs gradient": [p.requires_grad for p in module.parameters()],
        "training": [m.training for m in module.modules()],
        "hooks": [len(p._backward_hooks or {}) for p in module.parameters()],
        "random": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
    }
    return everything(left)


def each(**settings):
    return GradientVariance(every_n_steps=1, samples=2, noise_levels=2, **settings)


def ddpm_given(**settings):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=100)
    return each(loss=ddpm_loss, schedule=DiffusersSchedule(scheduler), **settings)


def targets_of_pictures():
    return TargetVariance(
        noise_levels=3, samples=64, schedule=VP(), clean=lambda batch: batch["image"]
    )


def targets():
    return TargetVariance(noise_levels=3, samples=64)


def both(first, second):
    return lambda: [first(), second()]


RUNS = {
    "classifier": (Classifier, labelled, [lambda: [each()]], list),
    "accumulated": (Classifier, labelled, [lambda: [each()]], list),
    "ddpm": (
        DDPM,
        pictures,
        [lambda: [each(), ddpm_given(), targets_of_pictures()]],
        list,
    ),
    "gan": (GAN, labelled, [lambda: [each(loss=critic_loss, schedule=VP())]], list),
    "dsm": (diffusion, gaussians, [both(each, targets)], list),
    "stf": (
        functools.partial(diffusion, STF(8)),
        gaussians,
        [both(targets, each), both(each, targets)],
        list,
    ),
    "averaged": (
        functools.partial(diffusion, STF(8)),
        gaussians,
        [both(averaging, each), lambda: [each(), averaging(), targets()]],
        lambda: [averaging()],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_resumption_are_bitwise_those_without_the_callback(tmp_path, name):
    kind, data, sets, without = RUNS[name]
    run = functools.partial(outcome, functools.partial(seeded, kind), data)
    options = {"accumulate_grad_batches": 2} if name == "accumulated" else {}
    found = []
    for i, callbacks in enumerate([without, *sets]):
        folder, again = tmp_path / str(i), tmp_path / f"{i}-resumed"
        first = run(folder, callbacks(), **options)
        end = str(folder / "end.ckpt")
        resumed = run(again, callbacks(), epochs=3, resume=end, **options)
        found.append((first, resumed))
        if i:
            assert logged(folder)["total"] > 0
            assert logged(again)["total"] > 0
    for result in found[1:]:
        for before, after in zip(found[0], result, strict=True):
            for what in before:
                assert before[what] == after[what], what


def test_without_a_loss_manual_optimization_is_refused_and_the_way_out_is_named(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="GAN with manual optimization: pass `loss`"
    ):
        trainer(tmp_path, each(), max_epochs=1).fit(GAN(), labelled())


class Copies(Callback):
    """Copies and saves the noise scheduler of a module before each training step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        table = copy.deepcopy(pl_module.scheduler).alphas_cumprod
        torch.save(table, self.folder / f"{batch_idx}.pt")


def test_what_a_noise_scheduler_keeps_of_a_measurement_can_be_copied_and_saved(tmp_path):
    fit = trainer(tmp_path, ddpm_given(), Copies(tmp_path), max_steps=3)
    fit.fit(DDPM(), pictures())
    for i in range(3):
        table = torch.load(tmp_path / f"{i}.pt", weights_only=True)
        assert torch.equal(table, DDPM().scheduler.alphas_cumprod)


@pytest.fixture
def measured(monkeypatch):
    """Every measurement of the whole, as it is added to the means."""
    found = []
    add = GradientStatistics.add

    def keep(self, components, memory=1.0):
        found.append(components)
        add(self, components, memory)

    monkeypatch.setattr(GradientStatistics, "add", keep)
    return found


def column(measured, name):
    return torch.stack([getattr(components, name)[0] for components in measured])


WAYS = {"halves": {}, "micro-batches": {"accumulate_grad_batches": 4}}


@pytest.mark.parametrize("way", WAYS)
def test_variance_and_squared_mean_are_those_of_a_closed_form(tmp_path, measured, z_score, way):
    module = LeastSquares()
    batch_size = 8 // WAYS[way].get("accumulate_grad_batches", 1)
    fit = trainer(tmp_path, each(), max_epochs=1, log_every_n_steps=50, **WAYS[way])
    fit.fit(module, normal_points(1600, batch_size))
    assert len(measured) == 200
    assert abs(z_score(column(measured, "total"), module.total)) < 4
    assert abs(z_score(column(measured, "squared_mean"), module.squared_mean)) < 4
    # less than a tenth off is told from what is right
    assert float(column(measured, "total").std()) / 200**0.5 < 0.1 * module.total


@pytest.mark.parametrize("way", WAYS)
def test_a_measurement_is_what_plain_gradients_say(tmp_path, measured, way):
    module = LeastSquares()
    parts, size = (2, 6) if way == "halves" else (4, 3)
    loader = normal_points(3 * parts * 5, size)
    trainer(tmp_path, each(), max_epochs=1, **WAYS[way]).fit(module, loader)
    x = loader.dataset.reshape(5, parts, -1, 3)
    weight = module.layer.weight.detach()
    gradients = (x * (x @ weight.mT)).mean(2).double()
    draws = x.shape[2]
    total = draws * gradients.var(dim=1).sum(dim=-1)
    squared_mean = gradients.mean(1).square().sum(-1) - total / (parts * draws)
    torch.testing.assert_close(column(measured, "total"), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(column(measured, "squared_mean"), squared_mean, rtol=1e-4, atol=1e-6)


def test_the_logged_noise_scale_is_a_ratio_of_fading_means(tmp_path, measured):
    trainer(tmp_path, each(), max_epochs=1).fit(LeastSquares(), normal_points(160, 8))
    weight = 0.9 ** torch.arange(len(measured) - 1, -1, -1, dtype=torch.float64)
    means = {
        name: float((weight * column(measured, name)).sum() / weight.sum())
        for name in ("total", "squared_mean")
    }
    numbers = logged(tmp_path)
    assert numbers["total"] == pytest.approx(means["total"])
    assert numbers["noise_scale"] == pytest.approx(means["total"] / means["squared_mean"])
    assert numbers["signal_to_noise"] == pytest.approx(means["squared_mean"] / means["total"])


@pytest.mark.parametrize("size", [28, 31], ids=["fewer-batches", "smaller-batch"])
def test_a_short_window_at_the_end_of_an_epoch_does_not_count(tmp_path, measured, size):
    fit = trainer(tmp_path, each(), max_epochs=2, accumulate_grad_batches=4)
    fit.fit(LeastSquares(), normal_points(size, 2))
    counted = [not math.isnan(value) for value in column(measured, "total")]
    assert counted == [True, True, True, False] * 2
    assert logged(tmp_path)["total"] > 0


class Skips(LeastSquares):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 5 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_whose_training_step_returns_nothing_does_not_count(tmp_path, measured, way):
    accumulation = WAYS[way].get("accumulate_grad_batches", 1)
    fit = trainer(tmp_path, each(), max_epochs=1, **WAYS[way])
    fit.fit(Skips(), normal_points(48, 4))
    counted = [not math.isnan(value) for value in column(measured, "total")]
    assert counted == ([True, False, True] if accumulation == 4 else [True] * 11)


def test_clipping_the_gradient_does_not_change_what_is_measured(tmp_path, measured):
    for clip in (None, 1e-4):
        fit = trainer(
            tmp_path / str(clip),
            each(),
            max_epochs=1,
            accumulate_grad_batches=4,
            gradient_clip_val=clip,
        )
        fit.fit(LeastSquares(), normal_points(32, 2))
    values = column(measured, "total").reshape(2, 4)
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("scale", [0.25, 2.0**16])
def test_a_scaled_loss_does_not_change_what_is_measured(tmp_path, measured, monkeypatch, scale):
    # the scaler of half precision, which trains on accelerators alone
    loader = normal_points(32, 8)
    trainer(tmp_path / "one", each(), max_epochs=1).fit(LeastSquares(), loader)
    monkeypatch.setattr(GradientProbe, "loss_scale", scale)
    trainer(tmp_path / "two", each(), max_epochs=1).fit(LeastSquares(), loader)
    values = column(measured, "total").reshape(2, 4)
    assert torch.equal(values[0], values[1])


class Searches(LeastSquares):
    """Evaluates the loss several times in a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_evaluates_again_trains_as_before(tmp_path, way):
    ends = []
    for callbacks in ([], [each()]):
        module = Searches()
        folder = tmp_path / str(len(ends))
        trainer(folder, *callbacks, max_epochs=1, **WAYS[way]).fit(module, normal_points(32, 4))
        ends.append(module.layer.weight.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], LeastSquares().layer.weight)


class Fails(LeastSquares):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def test_no_hook_is_left_on_the_parameters(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(len(pl_module.layer.weight._backward_hooks))

    settings = {"max_epochs": 1, "accumulate_grad_batches": 2}
    done, failed = LeastSquares(), Fails()
    trainer(tmp_path / "done", each(), Look(), **settings).fit(done, normal_points(12, 2))
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path / "failed", each(), Look(), **settings).fit(failed, normal_points(12, 2))
    assert set(seen) == {1}
    assert not done.layer.weight._backward_hooks
    assert not failed.layer.weight._backward_hooks


class Thaw(Callback):
    """Trains one layer, and from the second epoch on two."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net.requires_grad_(trainer.current_epoch > 0)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_that_thaw_in_mid_run_are_measured_from_then_on(tmp_path, way):
    callback = each()
    trainer(tmp_path, callback, Thaw(), max_epochs=2, **WAYS[way]).fit(Classifier(), labelled(48))
    assert callback.statistics.groups == ["net", "head"]
    assert float(callback.statistics.whole.total[1]) > 0


@pytest.mark.parametrize("every", [1, 2, 5, 6])
def test_a_step_with_two_optimizers_is_measured_at_the_cadence_too(tmp_path, every):
    callback = GradientVariance(every, samples=2, loss=critic_loss, schedule=VP())
    fit = trainer(tmp_path, callback, max_epochs=6)
    fit.fit(GAN(), labelled())
    assert fit.global_step == 48
    # the counter of optimizer steps goes on by two for each batch
    assert callback.state_dict()["measurements"] == pytest.approx(48 / max(every, 2), abs=1)


class Counted:
    """Counts the rows that pass through the modules it is hooked to."""

    def __init__(self):
        self.rows = 0

    def __call__(self, module, arguments):
        self.rows += len(arguments[0])

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("way", ["differences", "halves"])
def test_by_default_at_most_three_rows_are_measured_on_for_a_hundred_trained_on(tmp_path, way):
    counted = Counted()
    if way == "halves":
        module, data = LeastSquares(), normal_points(8 * 540, 8)
        network = module.layer
    else:
        module, data = diffusion(STF(8)), gaussians(batch_size=8, num_samples=4320)
        network = module.network
    network.register_forward_pre_hook(counted)
    callback = GradientVariance(samples=4)
    fit = trainer(tmp_path, callback, max_steps=540, limit_val_batches=0, log_every_n_steps=100)
    fit.fit(module, data)
    assert fit.global_step == 540
    extra = counted.rows - 4320
    assert 0 < extra <= 0.03 * 4320
    assert callback.state_dict()["measurements"] >= 1


def test_enough_samples_tell_all_noise_levels_at_each_measurement(tmp_path):
    callback = GradientVariance(every_n_steps=1, samples=4, noise_levels=2)
    trainer(tmp_path / "many", callback, max_steps=1).fit(diffusion(), gaussians())
    assert callback.statistics.levels.total.isfinite().all()
    few = GradientVariance(every_n_steps=1, samples=3, noise_levels=2)
    trainer(tmp_path / "few", few, max_steps=1).fit(diffusion(), gaussians())
    assert few.statistics.levels.total.isfinite().tolist() == [True, False]


@pytest.mark.pictures
def test_a_run_leaves_a_file_a_picture_and_a_table(tmp_path, capsys):
    callback = each()
    trainer(tmp_path, callback, max_epochs=2).fit(diffusion(), gaussians())
    table = rows(tmp_path / "gradient_variance.csv")
    steps = [row["step"] for row in table]
    assert sorted(set(steps), key=int) == [str(step) for step in range(8)]  # two epochs of four
    table = last_rows(tmp_path)
    groups = callback.statistics.groups
    kinds = ["whole", *["group"] * len(groups), *["noise level"] * 2]
    assert [kind for kind, _ in table] == kinds
    assert [name for _, name in table][1 : 1 + len(groups)] == groups
    assert table["whole", "all"]["total"] == float(callback.statistics.whole.total[0])
    for (kind, _), row in table.items():
        # `step`, values and errors, and of bins of the noise level their share
        assert len(row) == 11 + (kind == "noise level")
        assert sum(row[part] for part in PARTS) == pytest.approx(row["total"])
    with Image.open(tmp_path / "gradient_variance.png") as picture:
        assert min(picture.size) > 400

    printed = " ".join(capsys.readouterr().out.split())
    for word in ("Gradient variance", "noise level", "timestep %", "share %", "Noise scale"):
        assert word in printed


MEASURED = {
    "halves": (Classifier, labelled, each),
    "given": (DDPM, pictures, ddpm_given),
    "differences": (lambda: diffusion(STF(8)), gaussians, each),
}


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    """A run of each way to measure: its folder, its trainer and its callback."""

    @functools.cache
    def run(way):
        make, data, callback = MEASURED[way]
        folder, measuring = tmp_path_factory.mktemp(way), callback()
        fit = trainer(folder, measuring, max_epochs=2)
        fit.fit(make(), data())
        return folder, fit, measuring

    return run


@pytest.mark.pictures
@pytest.mark.parametrize("way", MEASURED)
def test_every_name_is_one_that_loggers_take_and_every_number_is_finite(measured_run, way):
    folder, fit, _ = measured_run(way)
    numbers = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("gradient_")}
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", name) for name in numbers)
    assert all(math.isfinite(value) for value in numbers.values())
    # loggers get those of the whole gradient
    whole = {name for name in numbers if name.count("/") == 1}
    assert {f"gradient_variance/{name}" for name in logged(folder)} == whole < set(numbers)


@pytest.mark.parametrize(
    ("way", "headers"),
    [
        ("halves", ["parameters", "total", "noise scale"]),
        ("given", ["noise level", "total", *(f"{p} %" for p in PARTS), "share %"]),
    ],
    ids=["totals", "components"],
)
def test_the_printed_table_has_no_column_without_a_number(measured_run, way, headers):
    _, _, measuring = measured_run(way)
    shown = report.table(measuring.statistics)
    assert [column.header for column in shown.columns] == headers
    assert all(any(column.cells) for column in shown.columns)
    names = list(shown.columns[0].cells)
    assert names == ["all", "net", "head"] if way == "halves" else names[0] == "all"


def test_on_any_module_without_arguments_the_totals_are_told(measured_run):
    folder, *_ = measured_run("halves")
    whole = {"total", "squared_mean", "signal_to_noise"}
    numbers, file = logged(folder), last_rows(folder)
    assert whole == set(numbers) - {"noise_scale"}
    assert set(file) == {("whole", "all"), ("group", "net"), ("group", "head")}
    parts = [file["group", name]["total"] for name in ("net", "head")]
    assert sum(parts) == pytest.approx(numbers["total"])
    assert file["whole", "all"]["total"] == numbers["total"]


def test_on_a_foreign_module_with_its_loss_the_decomposition_is_told(measured_run):
    folder, *_ = measured_run("given")
    numbers = logged(folder)
    assert sum(numbers[part] for part in PARTS) == pytest.approx(numbers["total"])
    levels = [row for (kind, _), row in last_rows(folder).items() if kind == "noise level"]
    assert len(levels) == 2
    for row in levels:
        assert sum(row[part] for part in PARTS) == pytest.approx(row["total"])
    assert sum(row["share"] for row in levels) == pytest.approx(1)


def test_a_gradient_without_variance_has_a_table_too():
    nothing = Components(*torch.tensor([[math.nan] * 2] * 3 + [[0.0] * 2] * 2).double())
    statistics = GradientStatistics(["net"], torch.zeros(0))
    statistics.add(nothing)
    assert [next(iter(c.cells)) for c in report.table(statistics).columns][:2] == ["all", "0"]


def test_before_anything_is_measured_nothing_is_written_and_a_warning_says_so(tmp_path, capsys):
    with pytest.warns(UserWarning, match="has measured nothing.*the run had 2. Pass `every_n"):
        trainer(tmp_path, GradientVariance(), max_steps=2).fit(Classifier(), labelled())
    assert not (tmp_path / "gradient_variance.csv").exists()
    assert "Gradient variance" not in capsys.readouterr().out


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_goes_on_with_the_means_of_the_first(tmp_path, way):
    def fit(folder, epochs, **resume):
        callback = each()
        run = trainer(tmp_path / folder, callback, max_epochs=epochs, **WAYS[way])
        run.fit(LeastSquares(), normal_points(48, 4), **resume)
        run.save_checkpoint(tmp_path / folder / "end.ckpt")
        return callback.state_dict()

    def weight(state):
        return float(state["statistics"]["whole"][0, 3, 0])

    first = fit("first", 1)
    end = str(tmp_path / "first" / "end.ckpt")
    resumed, unbroken = fit("resumed", 2, ckpt_path=end, weights_only=True), fit("unbroken", 2)
    count = 0 if way == "micro-batches" else 12
    assert [s["measurements"] for s in (first, resumed, unbroken)] == [count, 2 * count, 2 * count]
    assert weight(resumed) == pytest.approx(weight(unbroken))
    assert weight(resumed) > 1.2 * weight(first)
    if way == "micro-batches":  # which draw nothing
        assert torch.equal(resumed["statistics"]["whole"], unbroken["statistics"]["whole"])


def test_moments_of_other_groups_are_dropped_with_a_warning(tmp_path):
    first = each()
    trainer(tmp_path / "first", first, max_epochs=1).fit(Classifier(), labelled())
    state = first.state_dict()
    state["groups"] = ["other"]
    again = each()
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="moments are of the groups other, the module has "):
        trainer(tmp_path / "again", again, max_epochs=1).fit(Classifier(), labelled())


def test_two_instances_keep_states_of_their_own_in_one_checkpoint(tmp_path):
    def callbacks():
        return [each(), GradientVariance(every_n_steps=4), each(clean=labelled)]

    first = trainer(tmp_path / "first", *callbacks(), max_epochs=2)
    first.fit(Classifier(), labelled())
    first.save_checkpoint(tmp_path / "end.ckpt")
    resumed = callbacks()
    again = trainer(tmp_path / "again", *resumed, max_epochs=4)
    again.fit(Classifier(), labelled(), ckpt_path=str(tmp_path / "end.ckpt"), weights_only=True)
    assert [c.state_dict()["measurements"] for c in resumed] == [16, 4, 16]
    keys = {
        c.state_key
        for c in (*resumed, ddpm_given(), each(loss=critic_loss, schedule=VP()), each(clean=len))
    }
    assert len(keys) == 6


@pytest.mark.pictures
def test_a_second_fit_starts_a_table_of_its_own(tmp_path):
    callback = each()
    for number in range(2):
        folder = tmp_path / str(number)
        trainer(folder, callback, max_epochs=1).fit(Classifier(), labelled())
        assert (folder / "gradient_variance.png").exists()


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"samples": 1}, {"noise_levels": 0}])
def test_arguments_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        GradientVariance(**settings)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_parts_gradients_is_refused(kind):
    strategy = object.__new__(kind)
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} does not keep: train"):
        each().setup(SimpleNamespace(strategy=strategy), Classifier(), "fit")


def test_a_loss_without_its_schedule_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="needs the `schedule`"):
        trainer(tmp_path, each(loss=ddpm_loss), max_epochs=1).fit(DDPM(), pictures())


def test_a_loss_that_is_averaged_over_the_batch_is_refused_before_the_first_step(tmp_path):
    def mean(*arguments):
        return ddpm_loss(*arguments).mean()

    fit = trainer(tmp_path, each(loss=mean, schedule=VP()), max_epochs=1)
    with pytest.raises(ValueError, match="`loss` must return one number for each"):
        fit.fit(DDPM(), pictures())
    assert fit.global_step == 0


def test_a_batch_of_one_sample_is_refused_without_accumulation_and_measured_with_it(tmp_path):
    fit = trainer(tmp_path / "alone", each(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="needs two samples in a batch"):
        fit.fit(LeastSquares(), normal_points(4, 1))
    assert fit.global_step == 0
    fit = trainer(tmp_path / "two", each(), max_epochs=1, accumulate_grad_batches=2)
    fit.fit(LeastSquares(), normal_points(4, 1))
    assert logged(tmp_path / "two")["total"] > 0


class Uncopyable(LeastSquares):
    def __init__(self, what):
        super().__init__()
        self.what = what


@pytest.mark.parametrize(
    "make", [threading.Lock, lambda: (i for i in range(3))], ids=["lock", "generator"]
)
def test_a_module_that_cannot_be_copied_is_refused_and_the_ways_out_work(tmp_path, make):
    fit = trainer(tmp_path / "refused", each(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="cannot copy this Uncopyable to measure"):
        fit.fit(Uncopyable(make()), normal_points(8, 4))
    assert fit.global_step == 0

    accumulated = trainer(tmp_path / "sum", each(), max_epochs=1, accumulate_grad_batches=2)
    accumulated.fit(Uncopyable(make()), normal_points(8, 4))

    def loss(module, x0, noise, t):
        return 0.5 * module.layer(x0 + noise).square().squeeze(1)

    given = trainer(tmp_path / "given", each(loss=loss, schedule=VP()), max_epochs=1)
    given.fit(Uncopyable(make()), normal_points(8, 4))
    for folder in ("sum", "given"):
        assert logged(tmp_path / folder)["total"] > 0


def test_a_compiled_network_stays_compiled_and_is_measured_as_one_that_is_not(tmp_path):
    ends, totals = [], []
    for compiled, callbacks in ((True, []), (True, [each()]), (False, [each()])):
        module, folder = diffusion(compiled=compiled), tmp_path / str(len(ends))
        trainer(folder, *callbacks, max_epochs=1).fit(module, gaussians())
        ends.append(everything(list(module.state_dict().values())))
        totals.append(logged(folder).get("total"))
        calls = Compiled.calls
        module.network(torch.ones(16, 2), torch.ones(16))
        assert (Compiled.calls > calls) == compiled
    assert ends[0] == ends[1]
    assert totals[1] == pytest.approx(totals[2], rel=1e-4)


class Branches(nn.Module):
    """A network whose way depends on its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.layer(x) if x.abs().max() < 1e6 else x


class Normalises(Branches):
    """A network that couples the samples of a batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, t):
        return self.layer(self.norm(x))


@pytest.mark.parametrize(
    ("network", "target", "why"),
    [
        (Branches, None, "functorch says: "),
        (Normalises, None, "network.norm normalises over the batch"),
        (None, STF(8), "the draws of a batch depend on each other"),
    ],
)
def test_where_single_gradients_do_not_tell_batches_do_and_the_log_says_why(
    tmp_path, caplog, network, target, why
):
    ends = []
    for callbacks in ([], [each()]):
        module = diffusion(target)
        if network is not None:
            torch.manual_seed(0)
            module.network = network()
        folder = tmp_path / str(len(ends))
        with caplog.at_level("INFO"):
            trainer(folder, *callbacks, max_epochs=1).fit(module, gaussians())
        ends.append(everything(module.state_dict()))
    assert ends[0] == ends[1]
    assert f"measures by differences of batches: {why}" in caplog.text
    assert logged(folder)["total"] > 0


@pytest.mark.parametrize(
    ("make", "data", "callback"),
    [
        (Classifier, labelled, each),
        (diffusion, gaussians, each),
        (functools.partial(diffusion, STF(8)), gaussians, each),
    ],
    ids=["halves", "per-sample", "differences"],
)
def test_bfloat16_runs_as_before_and_is_measured(tmp_path, make, data, callback):
    ends, totals = [], []
    for precision, callbacks in (("bf16-mixed", []), ("bf16-mixed", [callback()]), (32, [each()])):
        module = seeded(make)
        folder = tmp_path / str(len(ends))
        torch.manual_seed(1)
        fit = trainer(folder, *callbacks, max_epochs=1, precision=precision)
        fit.fit(module, data())
        ends.append(everything(module.state_dict()))
        totals.append(logged(folder).get("total"))
    assert ends[0] == ends[1]
    assert totals[1] == pytest.approx(totals[2], rel=0.5)


class Scaled(MixedPrecision):
    """float16 with a scale of losses: Lightning's own on a CPU is bfloat16."""

    def __init__(self, scale):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def fitted(folder, make, batch_size, scale):
    fit = trainer(folder, each(), max_steps=3, plugins=[Scaled(scale)])
    fit.fit(seeded(make), gaussians(batch_size=batch_size, num_samples=4 * batch_size))
    return logged(folder)["total"]


def test_at_a_scale_at_which_a_step_is_finite_measurements_are(tmp_path):
    """A sample's gradient in float16 may be as many times that of its part of the batch's mean."""
    totals = [fitted(tmp_path / str(s), diffusion, 256, 2.0**s) for s in (4, 17)]
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


class Fused(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


class Unfused(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_gradients_that_a_fused_optimizer_takes_scaled_are_measured_as_others(tmp_path):
    totals = []
    for kind in (Unfused, Fused):
        folder = tmp_path / kind.__name__
        plugins = [Scaled(2.0**8)]
        fit = trainer(folder, each(), max_steps=3, accumulate_grad_batches=2, plugins=plugins)
        fit.fit(seeded(kind), labelled())
        totals.append(logged(folder)["total"])
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


def test_a_step_that_is_made_again_after_an_error_counts_once():
    callback, trainer = GradientVariance(), SimpleNamespace(global_step=3, log_every_n_steps=0)
    callback._probe = SimpleNamespace(before_optimizer_step=lambda: "found")
    for _ in range(2):
        callback.on_before_optimizer_step(trainer, None, None)
    assert callback._pending == ["found"]
