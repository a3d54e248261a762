import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vr.data import ImageFolder
from lightning_vr.data.image_error import ImageError
from lightning_vr.data.pixels import to_tensor
from tests.support.images import random_picture


@pytest.fixture
def folder(tmp_path):
    for name, count in (("cat", 6), ("ant", 4)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for index in range(count):
            place = tmp_path / name / ("deeper" if index % 2 else "")
            random_picture(100 * len(name) + index).save(place / f"{name}{index}.png")
    return tmp_path


def ready(datamodule):
    datamodule.setup()
    return datamodule


class TestImageFolder:
    def test_samples_are_the_files_at_their_index(self, folder):
        datamodule = ready(ImageFolder(folder, size=8, batch_size=2))
        for data in (datamodule.train_dataset, datamodule.validation_dataset):
            for index in range(len(data)):
                sample = data[index]
                expected = to_tensor(Image.open(data.source.paths[index]), 8, 3)
                assert torch.equal(sample["image"], expected)
                assert sample["index"] == index
                assert "label" not in sample
        assert datamodule.shape == (3, 8, 8)
        assert datamodule.num_classes is None

    def test_training_batches_are_the_rows_their_index_names(self, folder):
        datamodule = ready(ImageFolder(folder, size=8, batch_size=3, labels_from_folders=True))
        data = datamodule.train_dataset
        batches = list(datamodule.train_dataloader())
        assert len(batches) == len(data) // 3
        for batch in batches:
            rows = [data[index] for index in batch["index"].tolist()]
            assert torch.equal(batch["image"], torch.stack([row["image"] for row in rows]))
            assert torch.equal(batch["label"], torch.stack([row["label"] for row in rows]))

    def test_every_file_is_in_exactly_one_set(self, folder):
        datamodule = ready(ImageFolder(folder, size=8, batch_size=2, validation_fraction=0.3))
        train, validation = datamodule.train_dataset, datamodule.validation_dataset
        assert len(validation) == 3
        paths = [*train.source.paths, *validation.source.paths]
        assert sorted(paths) == sorted(folder.rglob("*.png"))

    def test_files_are_in_the_order_of_their_paths_whatever_the_file_system(self, folder):
        datamodule = ready(ImageFolder(folder, size=8, batch_size=2))
        for data in (datamodule.train_dataset, datamodule.validation_dataset):
            assert data.source.paths == sorted(data.source.paths)

    def test_split_follows_its_seed(self, folder):
        def held_out(seed):
            datamodule = ready(ImageFolder(folder, 8, 2, validation_fraction=0.3, seed=seed))
            return datamodule.validation_dataset.source.paths

        assert held_out(0) == held_out(0)
        assert len({tuple(held_out(seed)) for seed in range(5)}) > 1

    def test_labels_are_the_positions_of_the_sorted_folder_names(self, folder):
        datamodule = ready(ImageFolder(folder, size=8, batch_size=2, labels_from_folders=True))
        assert datamodule.classes == ["ant", "cat"]
        assert datamodule.num_classes == 2
        for data in (datamodule.train_dataset, datamodule.validation_dataset):
            for index in range(len(data)):
                name = data.source.paths[index].relative_to(folder).parts[0]
                assert datamodule.classes[data[index]["label"]] == name

    def test_number_of_classes_is_known_before_setup(self, folder):
        assert ImageFolder(folder, size=8, labels_from_folders=True).num_classes == 2

    def test_only_images_in_sight_are_found(self, folder):
        (folder / "notes.txt").write_text("no image")
        (folder / "cat" / "._cat0.png").write_bytes(b"no image")
        (folder / ".hidden").mkdir()
        random_picture(0).save(folder / ".hidden" / "image.png")
        random_picture(0).save(folder / "UPPER.JPG")
        datamodule = ready(ImageFolder(folder, size=8, batch_size=2))
        count = len(datamodule.train_dataset) + len(datamodule.validation_dataset)
        assert count == 11

    def test_linked_folders_are_followed(self, folder, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("linked")
        (elsewhere / "animals").symlink_to(folder, target_is_directory=True)
        datamodule = ready(ImageFolder(elsewhere, size=8, batch_size=2))
        assert len(datamodule.train_dataset) + len(datamodule.validation_dataset) == 10

    def test_flips_give_each_training_image_once_more_and_mirrored(self, folder):
        options = {"size": 8, "batch_size": 2, "labels_from_folders": True}
        plain = ready(ImageFolder(folder, **options))
        flipped = ready(ImageFolder(folder, horizontal_flip=True, **options))
        count = len(plain.train_dataset)
        assert len(flipped.train_dataset) == 2 * count
        for i in range(count):
            sample, mirrored = flipped.train_dataset[i], flipped.train_dataset[count + i]
            assert torch.equal(sample["image"], plain.train_dataset[i]["image"])
            assert torch.equal(mirrored["image"], sample["image"].flip(-1))
            assert mirrored["label"] == sample["label"]
            assert (sample["index"], mirrored["index"]) == (i, count + i)
        assert len(flipped.validation_dataset) == len(plain.validation_dataset)

    def test_sigma_data_is_the_standard_deviation_of_the_training_pixels(self, folder):
        datamodule = ready(ImageFolder(folder, size=8, batch_size=2, horizontal_flip=True))
        data = datamodule.train_dataset
        pixels = torch.stack([sample["image"] for sample in data]).double()
        state = torch.get_rng_state()
        assert datamodule.sigma_data == pytest.approx(float(pixels.std(correction=0)))
        assert torch.equal(torch.get_rng_state(), state)

    def test_data_set_travels_to_worker_processes(self, folder):
        data = ready(ImageFolder(folder, size=8, batch_size=2)).train_dataset
        copy = pickle.loads(pickle.dumps(data))
        assert torch.equal(copy[3]["image"], data[3]["image"])

    def test_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`path` must be an existing folder, got"):
            ImageFolder(tmp_path / "nowhere", size=8).setup()

    def test_folder_without_images_is_refused_with_what_is_looked_for(self, tmp_path):
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(
            ValueError,
            match=r"none of the files in .* ends in \.apng, .*\.webp \(there are: 1 \.txt\)",
        ):
            ImageFolder(tmp_path, size=8).setup()

    def test_unreadable_file_is_named_at_setup(self, folder):
        (folder / "cat" / "broken.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"Image .*broken\.png cannot be read"):
            ImageFolder(folder, size=8, batch_size=2).setup()

    def test_file_that_breaks_later_is_named_when_it_is_decoded(self, folder):
        data = ready(ImageFolder(folder, size=8, batch_size=2)).train_dataset
        path = data.source.paths[2]
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(ValueError, match=f"Image .*{path.name} cannot be read"):
            data[2]

    @pytest.mark.parametrize("kind", [np.int32, np.float32])
    def test_image_of_unknown_range_is_named_at_setup(self, folder, kind):
        Image.fromarray(np.zeros((4, 4), dtype=kind)).save(folder / "cat" / "odd.tif")
        with pytest.raises(ImageError, match=r"odd\.tif has mode [IF], .* not known: scale"):
            ImageFolder(folder, size=8, batch_size=2).setup()

    def test_image_of_too_many_pixels_is_named_with_the_limit_and_how_to_raise_it(self, folder):
        random_picture(0, 20, 30).save(folder / "cat" / "large.png")
        options = {"size": 8, "batch_size": 2}
        with pytest.raises(
            ImageError,
            match=r"Image .*large\.png has 20 x 30 = 600 pixels, above the limit of 599, .* set "
            r"`max_pixels` to 600 or more",
        ):
            ImageFolder(folder, max_pixels=599, **options).setup()
        data = ready(ImageFolder(folder, max_pixels=600, **options))
        assert all(sample["image"].shape == (3, 8, 8) for sample in data.train_dataset)

    def test_limit_of_pillow_is_the_default_and_is_checked_without_its_warning(
        self, folder, monkeypatch
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
        ready(ImageFolder(folder, size=8, batch_size=2))  # 120 pixels each, between both limits
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 59)
        with pytest.raises(ImageError, match="has 12 x 10 = 120 pixels, above the limit of 118"):
            ImageFolder(folder, size=8, batch_size=2).setup()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        ready(ImageFolder(folder, size=8, batch_size=2))

    def test_home_folder_is_found(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder))
        assert ready(ImageFolder("~/cat", size=8, batch_size=2)).path == folder / "cat"

    def test_16_bits_reach_the_samples_with_and_without_memory(self, folder):
        deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
        for name in ("a", "b"):
            Image.fromarray(deep).save(folder / f"{name}.png")
        for cache_bytes in (0, 2**20):
            options = {"channels": 1, "cache_bytes": cache_bytes, "validation_fraction": 0.01}
            data = ready(ImageFolder(folder, 8, 2, **options)).train_dataset
            index = [path.name in ("a.png", "b.png") for path in data.source.paths].index(True)
            for _ in range(2):
                found = data[index]["image"][0]
                torch.testing.assert_close(found, torch.from_numpy(deep / 32767.5 - 1).float())

    def test_log_says_what_is_left_out_what_is_transparent_and_what_memory_is_taken(
        self, folder, caplog
    ):
        (folder / "notes.txt").write_text("no image")
        (folder / "again").symlink_to(folder / "cat")
        random_picture(0).convert("RGBA").save(folder / "opaque.png")
        Image.new("RGBA", (9, 9), (0, 0, 0, 9)).save(folder / "clear.png")
        with caplog.at_level("INFO"):
            ready(ImageFolder(folder, size=8, batch_size=2, background="#0000ff"))
        left_out, transparent, memory = caplog.messages
        assert f"takes 12 images of {folder} and leaves out: 1 .txt, 1 links to what" in left_out
        assert "2 of 12 images have transparency, and of 2 of them that were decoded 1" in (
            transparent
        )
        assert "composited on `background`, which is (0, 0, 255); `channels` of 4" in transparent
        assert "keeps all 12 images in memory once they are decoded, in 0.00232 MB" in memory

    @pytest.mark.parametrize(
        ("cache_bytes", "message"),
        [
            (0, "decodes images on every access, as `cache_bytes` is 0"),
            (1000, "keeps 4 of 10 images in memory .* in 0.000772 MB that workers share"),
        ],
    )
    def test_log_says_that_memory_is_off_or_not_enough(self, folder, caplog, cache_bytes, message):
        with caplog.at_level("INFO"):
            ready(ImageFolder(folder, size=8, batch_size=2, cache_bytes=cache_bytes))
        (found,) = caplog.messages
        assert re.search(message, found)

    @pytest.mark.parametrize("cache_bytes", [0, 1000, 2**30])
    def test_samples_are_the_same_whatever_is_kept_in_memory(self, folder, cache_bytes):
        options = {"size": 8, "batch_size": 2, "horizontal_flip": True}
        plain = ready(ImageFolder(folder, cache_bytes=0, **options))
        kept = ready(ImageFolder(folder, cache_bytes=cache_bytes, **options))
        for name in ("train_dataset", "validation_dataset"):
            for _ in range(2):
                for one, other in zip(getattr(plain, name), getattr(kept, name), strict=True):
                    assert torch.equal(one["image"], other["image"])
                    assert one["index"] == other["index"]
        assert plain.sigma_data == kept.sigma_data

    def test_links_between_classes_are_reported(self, folder, caplog):
        (folder / "kitten").symlink_to(folder / "cat")
        with caplog.at_level("INFO"):
            data = ready(ImageFolder(folder, 8, 2, labels_from_folders=True))
        assert data.classes == ["ant", "cat"]
        assert any("kitten is what cat is, and has the class cat" in x for x in caplog.messages)

    def test_images_outside_of_class_folders_are_refused(self, folder):
        random_picture(0).save(folder / "loose.png")
        with pytest.raises(
            ValueError, match=r"every image is in a sub-folder .* got true and the image loose\.png"
        ):
            ImageFolder(folder, size=8, batch_size=2, labels_from_folders=True).setup()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 0}, "`size` must be at least 1, got 0"),
            ({"channels": 2}, "`channels` must be 1, 3 or 4, got 2"),
            ({"cache_bytes": -1}, "`cache_bytes` must be at least 0, got -1"),
            ({"max_pixels": 0}, "`max_pixels` must be at least 1, got 0"),
            ({"background": "whit"}, "`background` must be the name of a colour"),
        ],
    )
    def test_bad_arguments_are_refused_when_built(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ImageFolder(**{"path": "anywhere", "size": 8, **arguments})

    def test_batch_larger_than_the_training_set_is_refused(self, folder):
        with pytest.raises(ValueError, match="between 1 and 9, the size of the training set"):
            ImageFolder(folder, size=8, batch_size=10).setup()
