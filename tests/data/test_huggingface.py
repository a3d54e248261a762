import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vr.data import HuggingFaceImages
from lightning_vr.data.images import to_tensor

datasets = pytest.importorskip("datasets")


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def rows(count: int, seed: int = 0, **columns) -> "datasets.Dataset":
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.ClassLabel(names=["ant", "cat", "dog"]),
            "number": datasets.Value("int64"),
            "name": datasets.Value("string"),
        }
    )
    content = {
        "image": pictures(count, seed),
        "kind": [index % 3 for index in range(count)],
        "number": [index % 2 for index in range(count)],
        "name": [str(index) for index in range(count)],
    }
    return datasets.Dataset.from_dict(content | columns, features=features)


@pytest.fixture
def path(tmp_path):
    rows(12).save_to_disk(tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture
def splits(tmp_path):
    several = datasets.DatasetDict({"train": rows(9, 1), "test": rows(6, 2)})
    several.save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def ready(datamodule):
    datamodule.setup()
    return datamodule


def test_samples_are_the_rows_at_their_index(path):
    datamodule = ready(HuggingFaceImages(path, size=8, batch_size=2, label_column="kind"))
    originals = [to_tensor(image, 8, 3) for image in pictures(12)]
    found = []
    for data in (datamodule.train_dataset, datamodule.validation_dataset):
        for index in range(len(data)):
            sample = data[index]
            (row,) = [k for k, image in enumerate(originals) if torch.equal(image, sample["image"])]
            assert sample["index"] == index
            assert sample["label"] == row % 3
            found.append(row)
    assert sorted(found) == list(range(12))
    assert datamodule.shape == (3, 8, 8)


def test_training_batches_are_the_rows_their_index_names(path):
    datamodule = ready(HuggingFaceImages(path, size=8, batch_size=4, label_column="kind"))
    data = datamodule.train_dataset
    for batch in datamodule.train_dataloader():
        rows = [data[index] for index in batch["index"].tolist()]
        assert torch.equal(batch["image"], torch.stack([row["image"] for row in rows]))
        assert torch.equal(batch["label"], torch.stack([row["label"] for row in rows]))


def test_split_without_labels_follows_its_seed(path):
    def held_out(seed):
        datamodule = ready(
            HuggingFaceImages(path, size=8, batch_size=2, validation_fraction=0.3, seed=seed)
        )
        return tuple(datamodule.validation_dataset.source.rows["name"][:])

    assert held_out(0) == held_out(0)
    assert len(held_out(0)) == 4
    assert len({held_out(seed) for seed in range(5)}) > 1


def test_named_splits_are_used_whole(splits):
    datamodule = ready(HuggingFaceImages(splits, size=8, batch_size=2, validation_split="test"))
    for data, count, seed in (
        (datamodule.train_dataset, 9, 1),
        (datamodule.validation_dataset, 6, 2),
    ):
        assert len(data) == count
        for index, image in enumerate(pictures(count, seed)):
            assert torch.equal(data[index]["image"], to_tensor(image, 8, 3))


def test_training_split_is_divided_if_no_validation_split_is_named(splits):
    datamodule = ready(HuggingFaceImages(splits, size=8, batch_size=2))
    assert len(datamodule.train_dataset) == 8
    assert len(datamodule.validation_dataset) == 1


@pytest.mark.parametrize(("column", "classes"), [("kind", 3), ("number", 2), (None, None)])
def test_number_of_classes_is_known_before_setup(path, column, classes):
    assert HuggingFaceImages(path, size=8, label_column=column).num_classes == classes


def test_format_of_the_rows_does_not_matter(tmp_path, path):
    rows(12).with_format("torch").save_to_disk(tmp_path / "formatted")
    plain = ready(HuggingFaceImages(path, size=8, batch_size=2, label_column="kind"))
    formatted = ready(
        HuggingFaceImages(tmp_path / "formatted", size=8, batch_size=2, label_column="kind")
    )
    for name in ("image", "label"):
        assert torch.equal(formatted.train_dataset[3][name], plain.train_dataset[3][name])


def test_flips_and_grey_reach_the_training_set(path):
    datamodule = ready(
        HuggingFaceImages(path, size=8, batch_size=2, channels=1, horizontal_flip=True)
    )
    assert datamodule.train_dataset.horizontal_flip
    assert not datamodule.validation_dataset.horizontal_flip
    assert datamodule.train_dataset[0]["image"].shape == datamodule.shape == (1, 8, 8)


def test_data_set_travels_to_worker_processes(path):
    data = ready(HuggingFaceImages(path, size=8, batch_size=2)).train_dataset
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[3]["image"], data[3]["image"])


def test_folder_without_a_data_set_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`path` must be a folder that `save_to_disk` of `datasets` wrote"
    ):
        HuggingFaceImages(tmp_path, size=8).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_column": "photo"}, r"`image_column` must be in \['image'\]"),
        ({"image_column": "name"}, r"`image_column` must be in \['image'\]"),
        ({"label_column": "breed"}, r"`label_column` must be in \['image', 'kind'"),
        ({"label_column": "name"}, "`label_column` must be a column of integers, got 'name'"),
    ],
)
def test_missing_and_unsuitable_columns_are_refused(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceImages(path, size=8, batch_size=2, **arguments).setup()


@pytest.mark.parametrize("arguments", [{"train_split": "all"}, {"validation_split": "valid"}])
def test_unknown_splits_are_refused(splits, arguments):
    with pytest.raises(ValueError, match=r"must be in \['train', 'test'\], the splits of"):
        HuggingFaceImages(splits, size=8, batch_size=2, **arguments).setup()


def test_a_single_split_has_no_other_to_validate_on(path):
    with pytest.raises(ValueError, match=r"must be in \['train'\], the splits of"):
        HuggingFaceImages(path, size=8, batch_size=2, validation_split="test").setup()


@pytest.mark.parametrize(
    ("column", "labels", "message"),
    [
        ("kind", [-1] + [0] * 11, r"1 of .* are not, the first at index \d+, which is -1"),
        ("number", [-1] + [0] * 11, "which is -1"),
        ("number", [None] + [0] * 11, "or rows without a label"),
    ],
)
def test_rows_without_a_class_are_refused(tmp_path, column, labels, message):
    rows(12, **{column: labels}).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(ValueError, match=message):
        HuggingFaceImages(
            tmp_path / "unlabelled", size=8, batch_size=2, label_column=column
        ).setup()


def test_row_without_an_image_is_named_when_it_is_decoded(tmp_path):
    images = pictures(12)
    images[5] = None
    rows(12, image=images).save_to_disk(tmp_path / "gaps")
    datamodule = HuggingFaceImages(
        tmp_path / "gaps", size=8, batch_size=2, train_split="all", validation_split="all"
    )
    data = ready(datamodule).train_dataset
    assert data[4]["image"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="Image in row 5, column 'image' cannot be read"):
        data[5]


def test_missing_package_is_named_with_how_to_install_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install lightning-vr\[datasets\]"):
        HuggingFaceImages(path, size=8).setup()
