"""Latents that are read from a cache on disk."""

import json
import pickle

import pytest
import torch
from support.latents import write_cache
from torch.utils.data import DataLoader

from lightning_vr.data import CachedLatents

SOURCE = torch.Generator().manual_seed(0)
MEAN = torch.randn(10, 2, 3, generator=SOURCE)
STD = torch.rand(10, 2, 3, generator=SOURCE) + 0.5
TEXT = torch.randn(10, 4, generator=SOURCE)


@pytest.fixture
def cache(tmp_path):
    columns = {"label": torch.arange(10) % 3, "cond.text": TEXT, "cond.more.deep": TEXT + 1}
    write_cache(tmp_path, MEAN, STD, **columns)
    return tmp_path


def opened(cache, **options):
    data = CachedLatents(str(cache), batch_size=5, **options)
    data.setup()
    return data


def test_draws_have_the_mean_and_the_variance_of_the_posterior(cache):
    data = opened(cache).train_dataset
    draws = []
    for epoch in range(400):
        data.start_epoch(0, epoch)
        draws.append(torch.stack([data[i]["x0"] for i in range(10)]))
    z = (torch.stack(draws) - MEAN) / STD
    assert float((z.mean(dim=0) * 20).abs().max()) < 4
    # the variance of a square of a standard normal is 2
    assert float(((z.square().mean(dim=0) - 1) * 20 / 2**0.5).abs().max()) < 4.5
    neighbours = (z[:, 0] * z[:, 1]).mean(dim=0) * 20
    assert float(neighbours.abs().max()) < 4


def test_each_epoch_has_draws_of_its_own_in_all_workers(cache):
    def epochs(data):
        loader = data.train_dataloader()
        found = []
        for _ in range(2):
            batches = list(loader)
            order = torch.cat([batch["index"] for batch in batches]).argsort()
            found.append(torch.cat([batch["x0"] for batch in batches])[order])
        return found

    torch.manual_seed(3)
    first, second = epochs(opened(cache))
    assert not torch.equal(first, second)
    for other in (opened(cache), opened(cache, num_workers=1)):
        again = epochs(other)
        assert torch.equal(again[0], first)
        assert torch.equal(again[1], second)


def test_rows_have_labels_and_nested_conditions(cache):
    data = opened(cache, posterior="mean")
    assert data.num_classes == 3
    assert data.shape == (2, 3)
    copied = pickle.loads(pickle.dumps(data.train_dataset))
    (batch,) = DataLoader(copied, batch_size=10)
    assert torch.equal(batch["x0"], MEAN)
    assert torch.equal(batch["label"], torch.arange(10) % 3)
    assert torch.equal(batch["index"], torch.arange(10))
    assert torch.equal(batch["cond"]["text"], TEXT)
    assert torch.equal(batch["cond"]["more"]["deep"], TEXT + 1)


def test_validation_keeps_one_draw(cache):
    data = opened(cache)
    (first,), (second,) = (list(DataLoader(data.validation_dataset, 10)) for _ in range(2))
    assert torch.equal(first["x0"], second["x0"])
    assert not torch.equal(first["x0"], MEAN)


def test_the_standard_deviation_is_that_of_draws_or_of_means(cache):
    assert opened(cache, posterior="mean").sigma_data == pytest.approx(
        float(MEAN.std(correction=0))
    )
    whole = (MEAN.var(correction=0) + STD.square().mean()).sqrt()
    assert opened(cache).sigma_data == pytest.approx(float(whole))


def truncated(cache):
    path = cache / "train/latents-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def removed(cache):
    (cache / "validation/latents-00001.safetensors").unlink()


def without_index(cache):
    (cache / "index.json").unlink()


def broken_index(cache):
    (cache / "index.json").write_text("{")


def index_of_other_files(cache):
    path = cache / "index.json"
    path.write_text(path.read_text().replace("train/latents-00001", "../latents-00001"))


def index_of_no_numbers(cache):
    path = cache / "index.json"
    index = json.loads(path.read_text())
    index["sums"]["train"]["entries"] = 0
    path.write_text(json.dumps(index))


def exchanged(cache):
    first, second = (cache / f"train/latents-0000{i}.safetensors" for i in (1, 2))
    first.write_bytes(second.read_bytes())
    index = json.loads((cache / "index.json").read_text())
    index["shards"]["train"][0]["size"] = second.stat().st_size
    (cache / "index.json").write_text(json.dumps(index))


def changed(cache):
    path = cache / "train/latents-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def damaged_header(cache):
    path = cache / "train/latents-00001.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, r"latents-00002.safetensors must have \d+ bytes, got"),
        (removed, r"latents-00001.safetensors must have \d+ bytes, got None"),
        (without_index, "has no index.json"),
        (broken_index, "index.json does not read"),
        (index_of_other_files, "is not where it should be"),
        (index_of_no_numbers, "ZeroDivisionError"),
        (exchanged, "has first 4 and not 0"),
        (changed, "other numbers than were written"),
        (damaged_header, "is damaged"),
    ],
)
def test_a_damaged_cache_is_refused_in_one_line(cache, damage, reason):
    damage(cache)
    with pytest.raises(ValueError, match=reason) as error:
        opened(cache, verify=True).train_dataset[0]
    assert "\n" not in str(error.value)
    assert "`path` must be" in str(error.value)


def test_a_shard_of_another_cache_is_refused(cache, tmp_path):
    other = tmp_path / "other"
    write_cache(other, MEAN, STD, autoencoder="another", label=torch.arange(10) % 3)
    index = json.loads((other / "index.json").read_text())
    index["identity"]["autoencoder"] = ""
    (other / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"one autoencoder and one data set, but .* has identity"):
        opened(other).train_dataset[0]
