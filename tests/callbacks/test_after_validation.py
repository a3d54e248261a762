"""Samples after validation: averaged weights, every order of callbacks, and what is refused."""

import functools
from itertools import permutations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_vr import EMA, DiffusionModule, FrechetDistance, ResidualMLP, SampleGrid, Sampler
from lightning_vr.callbacks import sample_blocks
from lightning_vr.callbacks.after_validation import AfterValidation
from lightning_vr.callbacks.pictures import save_picture
from lightning_vr.data import EightGaussians
from lightning_vr.metrics import IdentityFeatures, RandomConvFeatures

FRECHET = "frechet_distance/identity_n40"


def module():
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    return DiffusionModule(
        ResidualMLP(width=16, depth=1), optimizer=optimizer, sampler=Sampler(steps=4)
    )


def data():
    return EightGaussians(batch_size=32, num_samples=128, num_validation=32)


def trainer(tmp_path, *callbacks, **settings):
    defaults = {
        "accelerator": "cpu",
        "max_steps": 8,
        "check_val_every_n_epoch": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": CSVLogger(tmp_path, name="", version=""),
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def test_every_order_of_callbacks_gives_the_same_numbers_and_pictures(tmp_path):
    results = []
    for i, order in enumerate(permutations(range(3))):
        callbacks = [
            EMA(decay=0.5),
            FrechetDistance(samples=40),
            SampleGrid(samples=8),
        ]
        fit = trainer(tmp_path / str(i), *(callbacks[k] for k in order), max_steps=4)
        fit.fit(module(), data())
        pictures = sorted((tmp_path / str(i) / "samples").glob("*.png"))
        results.append((float(fit.callback_metrics[FRECHET]), [p.read_bytes() for p in pictures]))
    assert all(result == results[0] for result in results)
    assert len(results[0][1]) == 1


def test_averaged_weights_are_what_is_measured(tmp_path):
    with_average = trainer(tmp_path / "average", FrechetDistance(samples=40), EMA(decay=0.5))
    averaged = module()
    with_average.fit(averaged, data())
    raw = trainer(tmp_path / "raw", FrechetDistance(samples=40))
    raw.fit(module(), data())
    measured = float(with_average.callback_metrics[FRECHET])
    assert measured != float(raw.callback_metrics[FRECHET])

    # after fit the module holds the average, which validation evaluates
    again = trainer(tmp_path / "again", FrechetDistance(samples=40))
    again.validate(averaged, datamodule=data(), verbose=False)
    assert float(again.callback_metrics[FRECHET]) == pytest.approx(measured, rel=1e-12)


def test_weights_that_were_never_averaged_are_not_swapped_in(tmp_path):
    late = EMA(decay=0.5, update_starting_at_step=100)
    values = []
    for callbacks in ([late, FrechetDistance(samples=40)], [FrechetDistance(samples=40)]):
        fit = trainer(tmp_path / str(len(callbacks)), *callbacks)
        fit.fit(module(), data())
        values.append(float(fit.callback_metrics[FRECHET]))
    assert values[0] == values[1]


def test_a_run_with_the_callbacks_ends_in_bitwise_the_same_weights(tmp_path):
    weights = []
    for callbacks in ([], [FrechetDistance(samples=40), SampleGrid(samples=8)]):
        watched = module()
        trainer(tmp_path / str(len(callbacks)), *callbacks).fit(watched, data())
        assert watched.training
        weights.append(watched.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Evaluating(AfterValidation):
    """Notes when it evaluates, and fails the first time if asked to."""

    def __init__(self, fails=False):
        super().__init__(None, every_n_validations=2)
        self.fails, self.steps = fails, []

    def evaluate(self, trainer, module):
        if self.fails:
            self.fails = False
            raise RuntimeError("the disk is gone")
        self.steps.append(trainer.global_step)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_an_evaluation_that_an_error_has_ended_is_done_again_by_the_resumed_run(tmp_path):
    settings = {"max_steps": 16}
    whole = Evaluating()
    trainer(tmp_path / "whole", whole, **settings).fit(module(), data())
    assert whole.steps == [8, 16]

    stopped = Evaluating(fails=True)
    saver = ModelCheckpoint(tmp_path / "kept", every_n_epochs=100, save_on_exception=True)
    run = trainer(tmp_path / "stopped", stopped, saver, enable_checkpointing=True, **settings)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run.fit(module(), data())
    assert stopped.steps == []

    resumed = Evaluating()
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    trainer(tmp_path / "resumed", resumed, **settings).fit(module(), data(), ckpt_path=path)
    assert resumed.steps == whole.steps


class Enlarging(DiffusionModule):
    def decode(self, x0):
        return 100 * x0


def test_a_second_fit_is_compared_with_its_own_training_set(tmp_path):
    found, used = [], FrechetDistance(samples=40)
    trainer(tmp_path / "first", used).fit(module(), data())
    for callback in (used, FrechetDistance(samples=40)):
        torch.manual_seed(0)
        other = trainer(tmp_path / str(len(found)), callback)
        other.fit(Enlarging(ResidualMLP(width=16, depth=1), sampler=Sampler(steps=4)), data())
        found.append(float(other.callback_metrics[FRECHET]))
    assert found[0] == found[1]


def test_the_number_reaches_the_csv_under_a_name_with_features_and_count(tmp_path):
    trainer(tmp_path, FrechetDistance(samples=40)).fit(module(), data())
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = header.split(",").index(FRECHET)
    assert sum(row.split(",")[column] != "" for row in rows) == 2


def test_every_n_validations_skips_the_others_also_across_a_resume(tmp_path):
    grid = SampleGrid(samples=4, every_n_validations=3)
    trainer(tmp_path, grid, max_steps=16).fit(module(), data())
    assert [p.name for p in (tmp_path / "samples").glob("*.png")] == ["step_00000012.png"]
    resumed = SampleGrid(samples=4, every_n_validations=3)
    resumed.load_state_dict(grid.state_dict())
    assert resumed.state_dict() == {"validations": 4}
    # a checkpoint brings the count along; a validation that was asked for is always evaluated
    trainer(tmp_path, resumed).validate(module(), datamodule=data(), verbose=False)
    assert (tmp_path / "samples/validate.png").exists()
    assert resumed.state_dict() == {"validations": 4}


class Foreign(LightningModule):
    """A module that knows nothing of diffusion."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["x0"]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def draw(module, count):
    return module.layer(torch.randn(count, 2))


def test_a_module_that_is_not_ours_is_sampled_through_a_function(tmp_path):
    callbacks = [
        FrechetDistance(samples=40, sample=draw, clean=lambda batch: batch["x0"]),
        SampleGrid(samples=4, sample=draw),
    ]
    fit = trainer(tmp_path, *callbacks)
    fit.fit(Foreign(), data())
    assert float(fit.callback_metrics[FRECHET]) > 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2


def test_a_module_that_is_not_ours_without_a_function_is_refused(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"`sample` must be given, .* cannot sample from a Foreign"
    ):
        trainer(tmp_path, SampleGrid()).fit(Foreign(), data())


def test_a_trainer_without_validation_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="after each validation run"):
        trainer(tmp_path, SampleGrid(), limit_val_batches=0).fit(module(), data())


def test_fewer_samples_than_features_are_refused_when_the_callback_is_built():
    with pytest.raises(ValueError, match=r"`samples` must be more than 64, .* got 64"):
        FrechetDistance(RandomConvFeatures(), samples=64)
    with pytest.raises(ValueError, match=r"`real_samples` must be more than 5, .* got 5"):
        FrechetDistance(IdentityFeatures(5), real_samples=5)


def test_samples_of_the_training_set_itself_are_at_distance_zero(tmp_path):
    points = data()
    points.setup("fit")
    fit = trainer(
        tmp_path,
        FrechetDistance(samples=128, sample=lambda module, count: points.train_dataset.x[:count]),
    )
    fit.fit(module(), points)
    # 128 samples generated at once are the training set
    assert float(fit.callback_metrics["frechet_distance/identity_n128"]) == pytest.approx(
        0, abs=1e-9
    )


def test_samples_take_all_classes_in_turn_whatever_is_drawn_at_a_time(tmp_path, monkeypatch):
    seen = []

    class Classes(DiffusionModule):
        def sample(self, count, *, group, **options):
            seen.append(group)
            return torch.randn(count, 2)

    monkeypatch.setattr(sample_blocks, "_BLOCK", 9)
    watched = Classes(ResidualMLP(num_class_embeds=9), num_classes=8, sampler=Sampler(steps=2))
    trainer(tmp_path, FrechetDistance(samples=20)).fit(watched, data())
    assert torch.cat(seen[-3:]).tolist() == [i % 8 for i in range(20)]


@pytest.mark.parametrize(("samples", "width"), [(16, 8), (3, 2)])
def test_classes_are_columns_of_a_grid_that_has_a_sample_of_each(tmp_path, samples, width):
    images = torch.zeros(samples, 1, 32, 32)
    grid = SampleGrid(samples=samples, sample=lambda module, count: images)
    fit = trainer(tmp_path, grid)
    watched = DiffusionModule(ResidualMLP(num_class_embeds=9), num_classes=8)
    fit.fit(watched, data())
    path = min((tmp_path / "samples").glob("*.png"))
    with Image.open(path) as picture:
        assert picture.width == width * 33


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_of_images_holds_each_image_in_its_place(tmp_path, channels):
    images = torch.full((7, channels, 8, 8), -1.0)
    images[5] = 0.5
    save_picture(images, tmp_path / "new" / "grid.png", columns=4)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.size == (4 * 9 * 5, 2 * 9 * 5)
        pixel = picture.getpixel((9 * 5 + 10, 9 * 5 + 10))
        assert pixel == (191 if channels == 1 else (191, 191, 191))
        assert picture.getpixel((10, 10)) == (0 if channels == 1 else (0, 0, 0))


def test_points_are_drawn_and_other_shapes_are_refused(tmp_path):
    save_picture(torch.randn(20, 2), tmp_path / "points.png")
    with Image.open(tmp_path / "points.png") as picture:
        assert picture.size == (600, 600)
    with pytest.raises(ValueError, match="override `decode`"):
        save_picture(torch.randn(4, 5), tmp_path / "no.png")


def test_samples_that_cannot_be_drawn_are_refused_at_the_first_step(tmp_path):
    class InThree(DiffusionModule):
        def decode(self, x0):
            return torch.cat([x0, x0[:, :1]], dim=1)

    grid = trainer(tmp_path, SampleGrid())
    with pytest.raises(MisconfigurationException, match=r"got \(3,\): override `decode`"):
        grid.fit(InThree(ResidualMLP(width=16, depth=1), sampler=Sampler(steps=2)), data())
    assert grid.global_step == 1


def test_a_validation_run_names_its_picture_after_itself(tmp_path):
    watched = module()
    trainer(tmp_path / "fit").fit(watched, data())
    validation = trainer(tmp_path / "validate", SampleGrid(samples=4))
    validation.validate(watched, datamodule=data(), verbose=False)
    assert [p.name for p in (tmp_path / "validate" / "samples").iterdir()] == ["validate.png"]
