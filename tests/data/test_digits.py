import pytest
import torch

from lightning_vr.data import Digits, digits


def test_digits_are_all_images_in_seventeen_levels_from_minus_one_to_one():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert torch.equal(images.unique(), torch.arange(17) / 8 - 1)
    assert labels.shape == (1797,)
    assert labels.unique().tolist() == list(range(10))


def test_training_and_validation_digits_together_are_all_digits():
    datamodule = Digits()
    datamodule.setup()
    train, validation = datamodule.train_dataset, datamodule.validation_dataset
    assert (len(train), len(validation)) == (1437, 360)

    images, labels = digits()
    together = torch.cat([train.x, validation.x]).flatten(1)
    label = torch.cat([train.label, validation.label])
    rows = torch.cat([together, label[:, None]], dim=1)
    expected = torch.cat([images.flatten(1), labels[:, None]], dim=1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_validation_digits_have_every_class_in_proportion():
    datamodule = Digits()
    datamodule.setup()
    _, labels = digits()
    shares = datamodule.validation_dataset.label.bincount() / labels.bincount()
    assert (shares - 0.2).abs().max() < 0.01


def test_attributes_of_the_digits_are_known_before_setup():
    assert Digits().shape == (1, 8, 8)
    assert Digits().num_classes == 10


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_split_with_an_empty_part_is_refused(fraction):
    with pytest.raises(ValueError, match=f"`validation_fraction` .* got {fraction} of 1797"):
        Digits(validation_fraction=fraction).setup()


def test_some_digits_keep_their_labels_and_are_all_of_their_classes():
    datamodule = Digits(classes=[7, 5])
    datamodule.setup()
    label = torch.cat([datamodule.train_dataset.label, datamodule.validation_dataset.label])
    _, labels = digits()
    assert label.bincount(minlength=10).tolist() == [
        int((labels == digit).sum()) if digit in (5, 7) else 0 for digit in range(10)
    ]
    assert datamodule.num_classes == 10


@pytest.mark.parametrize("classes", [[], [3, 10], [-1]])
def test_classes_that_are_no_digits_are_refused(classes):
    with pytest.raises(ValueError, match="`classes` must be digits from 0 to 9, got"):
        Digits(classes=classes)
