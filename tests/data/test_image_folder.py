import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vr.data import ImageFolder
from lightning_vr.data.images import evenly_spaced, to_tensor


def picture(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    for name, count in (("cat", 6), ("ant", 4)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for index in range(count):
            place = tmp_path / name / ("deeper" if index % 2 else "")
            picture(100 * len(name) + index).save(place / f"{name}{index}.png")
    return tmp_path


def ready(datamodule):
    datamodule.setup()
    return datamodule


class TestToTensor:
    def test_pixels_of_an_image_of_the_right_size_are_scaled_exactly(self):
        image = picture(0, 10, 10)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        actual = to_tensor(image, 10, 3)
        assert torch.equal(actual, expected)
        assert actual.dtype == torch.float32
        assert actual.min() >= -1
        assert actual.max() <= 1

    @pytest.mark.parametrize(("width", "height"), [(10, 4), (4, 10), (5, 4)])
    def test_center_square_is_what_remains(self, width, height):
        pixels = np.array(picture(1, width, height))
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        expected = torch.from_numpy(pixels[top : top + side, left : left + side] / 127.5 - 1)
        torch.testing.assert_close(
            to_tensor(Image.fromarray(pixels), side, 3), expected.permute(2, 0, 1).float()
        )

    def test_shrinking_averages(self):
        stripes = np.zeros((64, 64, 3), dtype=np.uint8)
        stripes[:, ::2] = 255
        shrunk = to_tensor(Image.fromarray(stripes), 8, 3)
        assert shrunk.shape == (3, 8, 8)
        assert shrunk.abs().max() < 0.1

    def test_a_constant_image_stays_constant_when_it_grows(self):
        grown = to_tensor(Image.new("RGB", (3, 3), (0, 51, 255)), 9, 3)
        expected = torch.tensor([-1.0, -0.6, 1.0])[:, None, None].expand(3, 9, 9)
        torch.testing.assert_close(grown, expected)

    def test_grey_from_colour_and_colour_from_grey(self):
        assert to_tensor(picture(2), 10, 1).shape == (1, 10, 10)
        grey = to_tensor(picture(2, 10, 10).convert("L"), 10, 3)
        assert torch.equal(grey[0], grey[1])
        assert torch.equal(grey[0], grey[2])
        assert torch.equal(grey[:1], to_tensor(picture(2, 10, 10), 10, 1))

    def test_transparency_is_dropped_without_a_warning(self):
        opaque = picture(3, 8, 8)
        see_through = opaque.copy()
        see_through.putalpha(40)
        assert torch.equal(to_tensor(see_through, 8, 3), to_tensor(opaque, 8, 3))

        palette = opaque.convert("P")
        palette.info["transparency"] = bytes(range(256))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert to_tensor(palette, 8, 3).shape == (3, 8, 8)

    def test_image_is_turned_as_its_exif_record_says(self):
        image = picture(4, 8, 8)
        exif = image.getexif()
        exif[0x0112] = 3
        turned = to_tensor(image, 8, 3)
        assert torch.equal(turned, to_tensor(picture(4, 8, 8), 8, 3).flip(1, 2))

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_more_than_eight_bits_are_refused(self, dtype):
        with pytest.raises(ValueError, match="more than 8 bits per channel"):
            to_tensor(Image.fromarray(np.zeros((4, 4), dtype=dtype)), 4, 1)


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
        picture(0).save(folder / ".hidden" / "image.png")
        picture(0).save(folder / "UPPER.JPG")
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
        with pytest.raises(ValueError, match=r"none of the files in .* ends in \.bmp, .*\.webp"):
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

    def test_image_of_more_than_eight_bits_is_named_when_it_is_decoded(self, folder):
        data = ready(ImageFolder(folder, size=8, batch_size=2)).train_dataset
        path = data.source.paths[0]
        Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(path)
        with pytest.raises(ValueError, match=f"{path.name} cannot .* more than 8 bits"):
            data[0]

    def test_images_outside_of_class_folders_are_refused(self, folder):
        picture(0).save(folder / "loose.png")
        with pytest.raises(
            ValueError, match=r"every image is in a sub-folder .* got true and the image loose\.png"
        ):
            ImageFolder(folder, size=8, batch_size=2, labels_from_folders=True).setup()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 0}, "`size` must be at least 1, got 0"),
            ({"channels": 4}, r"`channels` must be 1 \(grey\) or 3 \(colour\), got 4"),
        ],
    )
    def test_bad_arguments_are_refused_when_built(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ImageFolder(**{"path": "anywhere", "size": 8, **arguments})

    def test_batch_larger_than_the_training_set_is_refused(self, folder):
        with pytest.raises(ValueError, match="between 1 and 9, the size of the training set"):
            ImageFolder(folder, size=8, batch_size=10).setup()


@pytest.mark.parametrize(("count", "most"), [(3, 10), (10, 10), (1000, 10), (11, 10)])
def test_evenly_spaced_positions_are_distinct_and_no_more_than_wanted(count, most):
    positions = evenly_spaced(count, most)
    assert len(set(positions)) == len(positions) == min(count, most)
    assert positions[0] == 0
    assert positions[-1] < count
    gaps = np.diff(positions)
    assert gaps.max() - gaps.min() <= 1
