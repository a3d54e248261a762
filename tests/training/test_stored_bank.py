"""Banks that are kept in other dtypes, or that are the files of the data set."""

import pytest
import torch
from support.images import random_picture
from support.latents import write_cache
from support.networks import small_mlp, small_unet
from support.trainers import quiet_trainer

from lightning_vr import STF, Clean, DiffusionModule
from lightning_vr.data import CachedLatents, ImageFolder
from lightning_vr.posterior import References, StoredReferences

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

SOURCE = torch.Generator().manual_seed(0)
MEAN = torch.rand(22, 2, generator=SOURCE) * 2 - 1


class Doubled(DiffusionModule):
    def encode(self, batch):
        clean = super().encode(batch)
        return Clean(2 * clean.x0, clean.group, index=clean.index)


def fit(folder, kind=DiffusionModule, posterior="mean", num_classes=3, **options):
    """A fit of one epoch on a cache of three files; its module."""
    torch.manual_seed(1)
    network = small_mlp(num_class_embeds=num_classes and num_classes + 1)
    module = kind(network, target=STF(**options), num_classes=num_classes)
    data = CachedLatents(str(folder), batch_size=11, posterior=posterior)
    quiet_trainer(max_epochs=1).fit(module, datamodule=data)
    return module


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path, MEAN, 0 * MEAN, shard_size=9, label=torch.arange(22) % 3)
    return tmp_path


@pytest.mark.parametrize("references", ["all", 7])
def test_training_on_mapped_files_is_training_on_a_bank_in_memory(cache, references):
    memory = fit(cache, references=references)
    mapped = fit(cache, references=references, storage="data")
    assert isinstance(memory.target.bank, References)
    assert isinstance(mapped.target.bank, StoredReferences)
    assert [len(part) for part in mapped.target.bank.parts] == [9, 9, 4]
    assert torch.equal(mapped.target.bank.group, memory.target.bank.group)
    for one, other in zip(mapped.parameters(), memory.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", 2**-8), ("uint8", 1 / 255)])
def test_a_bank_of_fewer_bytes_holds_what_encode_returns_rounded(cache, dtype, stored):
    bank = fit(cache, references="all", dtype=dtype).target.bank
    (rows,) = bank.parts
    assert rows.dtype == getattr(torch, dtype)
    taken = bank.take(torch.arange(22))
    assert float((taken.rows + taken.centre - MEAN).abs().max()) <= stored


def test_without_classes_the_labels_of_files_are_no_groups(cache):
    assert fit(cache, num_classes=None, references="all", storage="data").target.bank.group is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": "sample"}, "needs data whose samples are stored .* got a LatentDataset"),
        ({"kind": Doubled}, "`encode` must return samples as they are stored"),
    ],
)
def test_files_that_are_not_the_samples_are_refused(cache, options, message):
    with pytest.raises(ValueError, match=message):
        fit(cache, references="all", storage="data", **options)


def fit_images(folder, target, **options):
    """A fit of one epoch on mirrored images of two classes, some held out; the module and data."""
    for row in range(10):
        (folder / "ab"[row % 2]).mkdir(exist_ok=True)
        random_picture(row, 8, 8).save(folder / "ab"[row % 2] / f"{row}.png")
    torch.manual_seed(1)
    network = small_unet(in_channels=3, out_channels=3, num_class_embeds=3)
    module = DiffusionModule(network, target=target, num_classes=2)
    options = {"labels_from_folders": True, "horizontal_flip": True, **options}
    data = ImageFolder(folder, 8, 4, validation_fraction=0.2, **options)
    quiet_trainer(max_epochs=1).fit(module, datamodule=data)
    return module, data


def test_the_images_that_a_data_set_keeps_are_a_bank_without_a_copy(tmp_path):
    memory, _ = fit_images(tmp_path, STF("all"))
    kept, data = fit_images(tmp_path, STF("all", storage="data"))
    images = data.train_dataloader().dataset
    parts = kept.target.bank.parts
    assert [part.dtype for part in parts] == 2 * [torch.uint8]
    assert parts[0].data_ptr() == images.cache.whole().data_ptr()

    rows = kept.target.bank.take(torch.arange(len(images))).rows + kept.target.bank.centre
    stored = torch.stack([images[i]["image"] for i in range(len(images))])
    torch.testing.assert_close(rows.reshape(stored.shape), stored, rtol=0, atol=1e-6)
    assert torch.equal(kept.target.bank.group, memory.target.bank.group)
    for one, other in zip(kept.parameters(), memory.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_images_that_are_not_all_kept_are_refused_as_a_bank(tmp_path):
    for size in (0, 700):
        with pytest.raises(ValueError, match="8-bit images that all fit in `cache_bytes`"):
            fit_images(tmp_path, STF("all", storage="data"), cache_bytes=size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "`dtype` must be .* got 'float8'"),
        ({"storage": "tape"}, "`storage` must be .* got 'tape'"),
        ({"references": "batch", "dtype": "uint8"}, "must be left out with references='batch'"),
        ({"dtype": "uint8", "storage": "data"}, "`dtype` must be left out with storage='data'"),
    ],
)
def test_banks_that_cannot_be_kept_like_this_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        STF(**({"references": "all"} | options))
