import pickle
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vr.data import HuggingFaceImages
from lightning_vr.data.image_column import ImageColumn
from lightning_vr.data.image_error import ImageError
from lightning_vr.data.inspection import inspect_images
from lightning_vr.data.pixels import to_tensor

datasets = pytest.importorskip("datasets")


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def png_bytes(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


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
        return tuple(datamodule.validation_dataset.source.positions.tolist())

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
        ({"image_column": "name"}, r"must be in \['image'\].* got 'name', a column of type Value"),
        ({"label_column": "breed"}, r"`label_column` must be in \['image', 'kind'"),
        ({"label_column": "name"}, "integers, .* got 'name', which holds '0' in row 0: number the"),
        (
            {"label_column": "image"},
            "integers, .* got 'image', which holds .* in row 0: convert it",
        ),
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
        ("kind", [0] * 7 + [-1] + [0] * 4, "got 'kind', which holds -1 in row 7: remove rows"),
        ("number", [0] * 9 + [-1, 0, 0], "got 'number', which holds -1 in row 9: remove rows"),
        ("number", [0, None] + [0] * 10, "got 'number', which holds None in row 1: remove rows"),
    ],
)
def test_rows_without_a_class_are_refused_by_their_number_on_disk(
    tmp_path, column, labels, message
):
    rows(12, **{column: labels}).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(ValueError, match=message):
        HuggingFaceImages(
            tmp_path / "unlabelled", size=8, batch_size=2, label_column=column
        ).setup()


def test_floating_point_classes_are_refused(tmp_path):
    content = {"image": pictures(4), "kind": [0.0, 1.0, 0.0, 1.0]}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("float32")})
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"which holds 0\.0 in row 0: convert it"):
        HuggingFaceImages(tmp_path / "rows", 8, 2, label_column="kind").setup()


def test_class_that_only_the_validation_split_has_is_named(tmp_path):
    several = {"train": rows(6), "test": rows(6, number=[0, 1, 0, 1, 5, 0])}
    datasets.DatasetDict(several).save_to_disk(tmp_path / "splits")
    datamodule = HuggingFaceImages(
        tmp_path / "splits", 8, 2, label_column="number", validation_split="test"
    )
    with pytest.raises(ValueError, match=r"in \[0, 2\), .* holds 5 in row 4 of split 'test'"):
        datamodule.setup()


@pytest.mark.parametrize("split", [None, "train"])
def test_row_without_an_image_is_named_as_on_disk_wherever_it_is_met(tmp_path, split, caplog):
    images = pictures(40)
    images[35] = None
    found = rows(40, image=images)
    (found if split is None else datasets.DatasetDict({split: found})).save_to_disk(tmp_path / "x")
    name = "row 35" if split is None else "row 35 of split 'train'"
    wrong = f"Image in {name}, column 'image' is missing: remove rows"
    with caplog.at_level("INFO"):
        datamodule = ready(HuggingFaceImages(tmp_path / "x", size=8, batch_size=2))
    assert any(
        f"1 of 40 rows have no image, the first is the one in {name}" in x for x in caplog.messages
    )
    for make_loader in (datamodule.train_dataloader, datamodule.val_dataloader):
        with pytest.raises(ImageError, match=wrong):
            make_loader()
    sets = datamodule.train_dataset, datamodule.validation_dataset
    (data,) = [data for data in sets if 35 in data.source.positions]
    with pytest.raises(ImageError, match=wrong):
        data[data.source.positions.tolist().index(35)]


def test_broken_image_is_named_at_setup(tmp_path):
    images = [{"bytes": png_bytes(image), "path": None} for image in pictures(12)]
    images[7] = {"bytes": b"no image", "path": None}
    rows(12, image=images).save_to_disk(tmp_path / "broken")
    with pytest.raises(ImageError, match="Image in row 7, column 'image' cannot be read"):
        HuggingFaceImages(tmp_path / "broken", size=8, batch_size=2).setup()


def test_image_that_is_a_file_elsewhere_is_opened_and_named(tmp_path):
    (image,) = pictures(1)
    image.save(tmp_path / "here.png")
    paths = [str(tmp_path / name) for name in ("gone.png", "here.png")]
    features = datasets.Features({"image": datasets.Image()})
    elsewhere = datasets.Dataset.from_dict({"image": paths}, features=features)
    column = ImageColumn(elsewhere, "image", torch.tensor([1, 0]), None, None)
    assert np.array_equal(np.asarray(column.open(0)), np.asarray(image))
    with pytest.raises(ImageError, match=r"row 0, column 'image' cannot be read .*gone\.png"):
        inspect_images(column, is_shown=False)


def test_columns_that_are_not_decoded_give_the_same_images(tmp_path, path):
    raw = rows(12).cast_column("image", datasets.Image(decode=False))
    raw.save_to_disk(tmp_path / "raw")
    plain = ready(HuggingFaceImages(path, size=8, batch_size=2))
    undecoded = ready(HuggingFaceImages(tmp_path / "raw", size=8, batch_size=2))
    for one, other in zip(plain.train_dataset, undecoded.train_dataset, strict=True):
        assert torch.equal(one["image"], other["image"])


@pytest.mark.parametrize("mode", [None, "RGB", "L"])
def test_transparent_images_are_composited(tmp_path, mode):
    clear = Image.new("RGBA", (8, 8), (9, 99, 9, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 4))
    features = datasets.Features({"image": datasets.Image(mode=mode)})
    content = {"image": [{"bytes": png_bytes(clear), "path": None}] * 4}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "clear")
    datamodule = ready(HuggingFaceImages(tmp_path / "clear", 8, 2, background=(255, 0, 0)))
    top, bottom = datamodule.train_dataset[0]["image"][:, [0, 7], 0].T.tolist()
    assert bottom == [1, -1, -1]
    assert top == [-1, -1, 1] if mode != "L" else top[0] == top[2] == pytest.approx(29 / 127.5 - 1)


def test_16_bits_are_kept_and_numbers_of_unknown_range_are_refused(tmp_path):
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    for dtype in (np.uint16, np.float32):
        content = {"image": [Image.fromarray(deep.astype(dtype))] * 4}
        features = datasets.Features({"image": datasets.Image()})
        found = datasets.Dataset.from_dict(content, features=features)
        found.save_to_disk(tmp_path / dtype.__name__)
    data = ready(HuggingFaceImages(tmp_path / "uint16", 8, 2, channels=1)).train_dataset
    for _ in range(2):
        torch.testing.assert_close(
            data[0]["image"][0], torch.from_numpy(deep / 32767.5 - 1).float()
        )
    with pytest.raises(ImageError, match="row 0, column 'image' has mode F, floating-point"):
        HuggingFaceImages(tmp_path / "float32", 8, 2).setup()


def test_empty_set_is_called_empty(tmp_path):
    rows(12).select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match=r"at least one row, but .*none has none: use another"):
        HuggingFaceImages(tmp_path / "none", 8, 2, label_column="number").setup()
    several = datasets.DatasetDict({"train": rows(4), "test": rows(4).select([])})
    several.save_to_disk(tmp_path / "x")
    with pytest.raises(ValueError, match=r"at least one row, but .*x/test has none"):
        HuggingFaceImages(tmp_path / "x", 8, 2, validation_split="test").setup()
    ready(HuggingFaceImages(tmp_path / "x", 8, 2))


def test_columns_of_paths_or_bytes_are_told_how_to_become_images(tmp_path):
    datasets.Dataset.from_dict({"file": ["a.png"] * 4}).save_to_disk(tmp_path / "paths")
    with pytest.raises(ValueError, match=r"must be in \[\], .* columns are \['file'\]: convert a"):
        HuggingFaceImages(tmp_path / "paths", 8, 2).setup()


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_damaged_data_set_is_refused(path, name):
    (path / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"`path` must be a folder that `save_to_disk` .* wrote"):
        HuggingFaceImages(path, size=8, batch_size=2).setup()


def test_missing_package_is_named_with_how_to_install_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install lightning-vr\[datasets\]"):
        HuggingFaceImages(path, size=8).setup()
