import pickle
import re

import pytest
from support.images import random_picture
from support.networks import small_unet
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader, Dataset

from lightning_vr.data import ImageFolder
from lightning_vr.data.image_error import ImageError, unreadable
from lightning_vr.training import DiffusionModule


class Broken(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        try:
            raise OSError("broken\nfile")
        except OSError as error:
            raise unreadable(f"x{index}.png", error) from error


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        random_picture(i, 8, 8).save(tmp_path / f"{i}.png")
    return tmp_path


def loader(workers):
    method = "fork" if workers else None
    return DataLoader(Broken(), num_workers=workers, multiprocessing_context=method)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_message_is_the_same_line_from_a_worker_and_without(workers):
    with pytest.raises(ImageError) as caught:
        next(iter(loader(workers)))
    assert str(caught.value) == (
        "Image x0.png cannot be read (OSError: broken file): repair or remove it."
    )


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_with_the_name_of_an_image_that_broke(folder, workers):
    data = ImageFolder(folder, 8, 4, channels=1, num_workers=workers, seed=1)
    data.setup()
    (folder / data.train_dataset.source.paths[2].name).write_bytes(b"no image")
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    with pytest.raises(ImageError) as caught:
        trainer.fit(DiffusionModule(small_unet()), datamodule=data)
    name = re.escape(str(data.train_dataset.source.paths[2]))
    assert re.fullmatch(
        rf"Image {name} cannot be read \(UnidentifiedImageError: cannot identify image file "
        rf".*\): repair or remove it\.",
        str(caught.value),
    )


def test_error_survives_pickling():
    error = ImageError("Image x.png is missing.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
