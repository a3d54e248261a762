"""Convergence in a run: what it writes, what it leaves alone, and whether its numbers agree."""

import csv
import functools

import pytest
import torch
from foreign_trainers import DDPM, ddpm_loss, pictures
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from support.comparisons import assert_equal
from support.conditions import CaptionedPoints, captioned
from support.networks import small_mlp
from support.points import Points, normal_points, two_classes
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import EMA, VP, Clean, Convergence, DiffusionModule
from lightning_vr.callbacks.convergence_losses import measured_loss
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.process.predictions import prediction

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

SETTINGS = {"every_n_steps": 2, "noise_levels": 4, "samples": 16}
TRAIN, HELD_OUT = Points(normal_points(40, "train")), Points(normal_points(24, "held out"))
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def module(kind=DiffusionModule, network=None, **options):
    return kind(network or small_mlp(std=0.5), optimizer=ADAM, **options)


def logged_trainer(folder, *callbacks, **options):
    logger = CSVLogger(folder, name="", version="")
    return quiet_trainer(*callbacks, logger=logger, log_every_n_steps=1, **options)


def fit(folder, *callbacks, model=None, train=TRAIN, batch_size=8, ckpt_path=None, **options):
    trainer = logged_trainer(folder, *callbacks, **({"max_epochs": 1} | options))
    loaders = DataLoader(train, batch_size), DataLoader(HELD_OUT, 8)
    trainer.fit(model or module(), *loaders, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def numbers(path, column):
    return torch.tensor([float(row[column]) for row in rows(path)], dtype=torch.float64)


@pytest.mark.pictures
def test_a_run_leaves_numbers_a_file_a_picture_and_sentences(tmp_path, capsys):
    watch = Convergence(**SETTINGS)
    trainer = fit(tmp_path, watch)
    table = rows(tmp_path / "convergence.csv")
    assert [row["step"] for row in table] == [s for s in ("0", "2", "4", "5") for _ in range(4)]
    with Image.open(tmp_path / "convergence.png") as picture:
        assert min(picture.size) > 400
    said = " ".join(capsys.readouterr().out.split())
    assert "Convergence: At step 5 the training loss is" in said
    assert watch.summary() in said

    last = {k: float(v) for k, v in table[-1].items()}
    assert last["loss"] == pytest.approx(last["floor"] + last["excess"])
    assert last["floor_low"] == last["floor"] == last["floor_high"]
    assert last["excess_low"] == last["excess"] == last["excess_high"]
    names = {"loss", "floor", "excess", "held_out"}
    assert {f"convergence/{name}" for name in names} <= trainer.callback_metrics.keys()
    points = [k for k in trainer.callback_metrics if k.startswith("convergence/excess/s")]
    assert len(points) == 4
    for name in names:
        mean = numbers(tmp_path / "convergence.csv", name)[-4:].mean()
        assert float(trainer.callback_metrics[f"convergence/{name}"]) == pytest.approx(float(mean))


@pytest.mark.pictures
def test_a_run_that_is_interrupted_leaves_the_picture_and_the_sentences_too(tmp_path, capsys):
    class Interrupt(Callback):
        def on_train_batch_end(self, *_):
            raise KeyboardInterrupt

    watch = Convergence(**SETTINGS)
    with pytest.raises(SystemExit):
        fit(tmp_path, watch, Interrupt())
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
    assert watch.summary() in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_bitwise_the_same_with_and_without_it(tmp_path, accumulate):
    found = []
    for watch in ([], [Convergence(**SETTINGS)]):
        torch.manual_seed(1)
        trainer = fit(
            tmp_path / str(len(found)), *watch, max_epochs=2, accumulate_grad_batches=accumulate
        )
        found.append((dict(trainer.lightning_module.state_dict()), torch.get_rng_state()))
    assert_equal(*found)


def test_a_module_of_diffusers_style_is_bitwise_the_same_and_measured_by_its_loss(tmp_path):
    found = []
    for watch in (None, Convergence(**SETTINGS, loss=ddpm_loss, schedule=DDPM().scheduler)):
        torch.manual_seed(1)
        model = DDPM()
        folder = tmp_path / str(len(found))
        trainer = logged_trainer(folder, *filter(None, [watch]), max_epochs=2)
        trainer.fit(model, pictures())
        found.append(dict(model.state_dict()))
    assert_equal(*found)
    last = rows(folder / "convergence.csv")[-1]
    assert last["held_out"] == "nan"
    assert float(last["excess"]) > 0


class Exact(DiffusionModule):
    """Predicts the posterior mean of its training set, by class."""

    def predict(self, x, noised):
        mean = posterior_mean(
            noised.xt,
            noised.alpha,
            noised.sigma,
            TRAIN.x0,
            query_group=noised.group,
            reference_group=two_classes(40),
        ).mean
        coefficients = prediction(self.prediction, self.schedule, noised.t, self.sigma_data)
        unused = 0 * next(self.network.parameters()).sum()
        return coefficients.output(noised.x0, noised.noise, mean) + unused


@pytest.mark.parametrize("settings", [{}, {"schedule": VP(), "prediction": "epsilon"}], ids=str)
def test_the_exact_denoiser_has_no_distance_in_a_run(tmp_path, settings):
    exact = module(Exact, small_mlp(num_class_embeds=3), num_classes=2, **settings)
    labelled = Points(TRAIN.x0, two_classes(40))
    watch = Convergence(**(SETTINGS | {"samples": 32, "noise_levels": 6}))
    trainer = logged_trainer(tmp_path, watch, max_steps=1)
    trainer.fit(exact, DataLoader(labelled, 8))
    table = tmp_path / "convergence.csv"
    assert (numbers(table, "excess") <= 2 * numbers(table, "excess_error")).all()
    assert float(numbers(table, "floor").max()) > 0.1


class Labelled(DDPM):
    """A trainer on labelled points whose network knows the answer of each class."""

    def training_step(self, batch, batch_idx):
        return 0 * next(self.unet.parameters()).sum()


def loss_of_exact(module, x0, noise, t, clean):
    xt, alpha, sigma = VP().perturb(x0, noise, t), VP().alpha(t), VP().sigma(t)
    groups = {"query_group": clean.group, "reference_group": two_classes(40)}
    return (posterior_mean(xt, alpha, sigma, TRAIN.x0, **groups).mean - x0).square().sum(1)


def test_a_given_loss_with_a_fifth_argument_sees_the_labels_and_so_does_its_optimum(tmp_path):
    data = DataLoader(Points(TRAIN.x0, two_classes(40)), 8)
    watch = Convergence(**(SETTINGS | {"samples": 32}), loss=loss_of_exact, schedule=VP())
    logged_trainer(tmp_path, watch, max_steps=1).fit(Labelled(), data)
    table = tmp_path / "convergence.csv"
    assert (numbers(table, "excess") <= 2 * numbers(table, "excess_error")).all()
    assert float(numbers(table, "floor").max()) > 0.1


def test_a_resumed_run_leaves_the_file_of_one_that_was_not_stopped(tmp_path):
    fit(tmp_path / "whole", Convergence(**SETTINGS), max_epochs=2, val_check_interval=1.0)
    first = fit(tmp_path / "parts", Convergence(**SETTINGS))
    first.save_checkpoint(tmp_path / "end.ckpt")
    fit(tmp_path / "parts", Convergence(**SETTINGS), max_epochs=2, ckpt_path=tmp_path / "end.ckpt")
    found, expected = (
        (tmp_path / name / "convergence.csv").read_text() for name in ("parts", "whole")
    )
    assert found == expected


def test_validations_of_other_data_in_a_checkpoint_are_dropped(tmp_path, caplog):
    fit(tmp_path, Convergence(**SETTINGS)).save_checkpoint(tmp_path / "end.ckpt")
    watch = Convergence(**SETTINGS)
    more = Points(normal_points(48, "more"))
    options = {"train": more, "max_epochs": 2, "ckpt_path": tmp_path / "end.ckpt"}
    fit(tmp_path / "other", watch, **options)
    assert "validations are of other data: they are dropped" in caplog.text
    assert [record.step for record in watch.records][:1] == [5]


def test_averaged_weights_are_measured_whatever_the_order_of_callbacks(tmp_path, capsys):
    tables = []
    for number, order in enumerate((1, -1)):
        callbacks = [Convergence(**SETTINGS), EMA(decay=0.5)][::order]
        trainer = fit(tmp_path / str(number), *callbacks)
        tables.append((tmp_path / str(number) / "convergence.csv").read_text())
        assert "Convergence of the averaged weights: At step" in capsys.readouterr().out
    assert tables[0] == tables[1]
    plain = fit(tmp_path / "plain", Convergence(**SETTINGS))
    assert (tmp_path / "plain" / "convergence.csv").read_text() != tables[0]
    assert trainer.global_step == plain.global_step


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_two_ranks_measure_what_one_process_does(tmp_path):
    for devices in (1, 2):
        fit(
            tmp_path / str(devices),
            Convergence(**SETTINGS),
            batch_size=8 // devices,
            max_steps=1,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
        )
    # at the first step the weights are the same
    for name in ("loss", "floor", "excess", "held_out", "held_out_floor_high"):
        one, two = (numbers(tmp_path / d / "convergence.csv", name)[:4] for d in "12")
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_from_a_part_of_the_data_floor_and_distance_are_brackets(tmp_path, caplog):
    watch = Convergence(**SETTINGS, max_data=20)
    fit(tmp_path, watch)
    assert "Convergence uses 20 of the 40 training samples" in caplog.text
    table = tmp_path / "convergence.csv"
    assert (numbers(table, "floor_low") < numbers(table, "floor_high")).any()
    assert (numbers(table, "excess_low") <= numbers(table, "excess")).all()
    assert (numbers(table, "excess") <= numbers(table, "excess_high")).all()
    assert "(between" in watch.summary()


def test_with_captions_that_nobody_shares_the_loss_is_measured_and_no_floor(tmp_path, caplog):
    watch = Convergence(**SETTINGS)
    trainer = logged_trainer(tmp_path, watch, max_steps=2)
    loaders = DataLoader(CaptionedPoints(), 8), DataLoader(CaptionedPoints(), 8)
    trainer.fit(captioned(), *loaders)
    assert "no two samples are exchangeable" in caplog.text
    table = tmp_path / "convergence.csv"
    assert numbers(table, "floor").isnan().all()
    assert bool((numbers(table, "loss") > 0).all())
    assert "how much of it can be removed is unknown" in watch.summary()


def test_by_default_it_takes_about_two_percent_of_the_time(tmp_path):
    watch = Convergence(noise_levels=4, samples=16)
    fit(tmp_path, watch)
    # 128 forward passes of a sample; a step of 8 costs 20 of them
    assert watch._every == 320
    assert [record.step for record in watch.records] == [0]


def test_labels_that_a_given_loss_does_not_see_mask_no_references():
    trainer = quiet_trainer()
    found = measured_loss(trainer, DDPM(), ddpm_loss, VP(), lambda batch: Clean(*batch))
    clean = found.clean((torch.zeros(3, 2), torch.arange(3)))
    assert clean.group is None
    assert clean.x0.shape == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [({}, "`loss` and `schedule`"), ({"schedule": VP()}, "`loss`"), ({"loss": len}, "`schedule`")],
    ids=str,
)
def test_without_a_loss_or_schedule_it_refuses_a_foreign_module(arguments, missing):
    with pytest.raises(MisconfigurationException, match=f"needs {missing} on a DDPM"):
        quiet_trainer(Convergence(**arguments), max_steps=1).fit(DDPM(), pictures())


def test_a_schedule_alone_is_refused_on_a_module_that_has_one():
    with pytest.raises(MisconfigurationException, match="needs `loss` on a DiffusionModule"):
        quiet_trainer(Convergence(schedule=VP()), max_steps=1).fit(module(), DataLoader(TRAIN, 8))


@pytest.mark.parametrize(
    "setting",
    [{"every_n_steps": 0}, {"noise_levels": 1}, {"samples": 15}, {"max_data": 1}],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_the_callback(setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` must be at least"):
        Convergence(**setting)


def test_instances_that_measure_differently_keep_states_of_their_own():
    keys = {Convergence(samples=n).state_key for n in (16, 32)}
    assert len(keys) == 2
