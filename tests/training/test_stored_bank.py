"""Banks that are kept in other dtypes, or that are the files of the data set."""

import pytest
import torch
from support.latents import write_cache
from support.networks import small_mlp
from support.trainers import quiet_trainer

from lightning_vr import STF, Clean, DiffusionModule
from lightning_vr.data import CachedLatents
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
        ({"posterior": "sample"}, "needs data whose samples are in files .* got a LatentDataset"),
        ({"kind": Doubled}, "`encode` must return samples as they are in the files"),
    ],
)
def test_files_that_are_not_the_samples_are_refused(cache, options, message):
    with pytest.raises(ValueError, match=message):
        fit(cache, references="all", storage="data", **options)


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
