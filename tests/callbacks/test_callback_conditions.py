"""What the samples of callbacks are conditioned on."""

import pytest
import torch
from PIL import Image
from support.conditions import WORDS, CaptionedPoints, CaptionModule, captioned, embedded
from support.networks import small_mlp
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import DiffusionModule, FrechetDistance, SampleGrid, Sampler
from lightning_vr.callbacks import sample_grid
from lightning_vr.data import EightGaussians

FAST = Sampler(steps=2)


class Recording(CaptionModule):
    """Keeps what samples were asked for."""

    def sample(self, count, **options):
        self.asked = [*getattr(self, "asked", []), (count, options["group"], options["cond"])]
        return super().sample(count, **options)


def fitted(callback, count=16, classes=None, validation=None, **options):
    model = captioned(classes, sampler=FAST, **options)
    model.__class__ = Recording
    data = CaptionedPoints(count, classes)
    loaders = [DataLoader(part, batch_size=8) for part in (data, validation or data)]
    trainer = quiet_trainer(callback, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(model, *loaders)
    return model


@pytest.fixture
def pictures(monkeypatch):
    """The pictures that would be drawn: samples, and columns of the grid."""
    drawn = []
    monkeypatch.setattr(
        sample_grid, "save_picture", lambda x, path, columns: drawn.append((x, columns))
    )
    monkeypatch.setattr(sample_grid, "log_picture", lambda *args: None)
    return drawn


def test_a_grid_has_one_row_for_each_of_the_first_validation_samples(pictures):
    validation = CaptionedPoints(3)
    model = fitted(SampleGrid(samples=12), validation=validation)
    count, group, cond = model.asked[-1]
    assert count == 12
    assert group is None
    assert torch.equal(cond["text"], embedded([w for w in WORDS[:3] for _ in range(4)])["text"])
    assert pictures[-1][1] == 4


def test_a_grid_has_one_row_for_each_prompt_of_a_file(pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("left\nup\n")
    model = fitted(SampleGrid(samples=7, conditions=tmp_path / "prompts.txt"))
    count, _, cond = model.asked[-1]
    assert (count, pictures[-1][1]) == (6, 3)
    assert torch.equal(cond["text"], embedded(["left"] * 3 + ["up"] * 3)["text"])


def test_labels_and_conditions_of_a_validation_sample_stay_together():
    callback = FrechetDistance(samples=20)
    model = fitted(callback, count=8, classes=2)
    count, group, cond = model.asked[-1]
    numbers = torch.arange(20) % 8
    assert count == 20
    assert torch.equal(group, numbers % 2)
    assert torch.equal(cond["added"]["size"][:, 0], (numbers % 4).float())


def test_labels_of_a_file_are_asked_for():
    callback = SampleGrid(samples=4, conditions={"label": [1, 0]})
    model = DiffusionModule(
        small_mlp(num_class_embeds=9), num_classes=8, label_dropout=0.1, sampler=FAST
    )
    trainer = quiet_trainer(callback, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(model, EightGaussians(num_samples=64, num_validation=16, batch_size=16))
    assert callback.asked(model, torch.arange(4), 2).group.tolist() == [1, 1, 0, 0]


def test_a_run_with_the_callbacks_is_bitwise_that_without(pictures):
    weights = []
    for callback in ([], [SampleGrid(samples=4), FrechetDistance(samples=20)]):
        model = captioned(sampler=FAST)
        loaders = [DataLoader(CaptionedPoints(), batch_size=8, shuffle=x) for x in (True, False)]
        torch.manual_seed(0)
        quiet_trainer(*callback, max_epochs=2).fit(model, *loaders)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_conditions_that_the_model_cannot_encode_are_refused():
    callback = SampleGrid(samples=4, conditions={"prompt": ["up"]})
    model = DiffusionModule(small_mlp(), sampler=FAST)
    trainer = quiet_trainer(callback, max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="does not say how to encode 'prompt'"):
        trainer.fit(model, EightGaussians(num_samples=64, num_validation=16, batch_size=16))


def test_pictures_of_prompts_are_written(tmp_path):
    callback = SampleGrid(samples=4, conditions={"prompt": ["left", "up"]})
    model = captioned(sampler=FAST)
    loader = DataLoader(CaptionedPoints(), batch_size=8)
    trainer = quiet_trainer(callback, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(model, loader, loader)
    path, *_ = tmp_path.glob("**/samples/*.png")
    with Image.open(path) as picture:
        assert picture.width > 100
