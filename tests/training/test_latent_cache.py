"""Encoding a data set once, into a cache on disk: whole, killed, damaged, on ranks, in commands."""

import json
import os
import signal
from multiprocessing import get_context

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support.latents import Pictures, save_autoencoder
from support.networks import small_unet
from support.trainers import quiet_trainer

from lightning_vr import AutoencoderFolder, DiffusionModule, LatentDiffusionModule, cache_latents
from lightning_vr.cli import main
from lightning_vr.data import CachedLatents

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

SIZES = {"batch_size": 2, "shard_size": 4}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    save_autoencoder(folder)
    return folder


def encoder(folder, kind=LatentDiffusionModule):
    network = small_unet(in_channels=2, out_channels=2, sample_size=4)
    return kind(network, AutoencoderFolder(str(folder)))


def write(module, folder, data=None, **options):
    trainer = options.pop("trainer", None) or quiet_trainer()
    cache_latents(module, data or Pictures(), folder, trainer=trainer, **(SIZES | options))


@pytest.fixture(scope="module")
def whole(vae, tmp_path_factory):
    """The files of an uninterrupted cache, and their contents."""
    folder = tmp_path_factory.mktemp("whole")
    write(encoder(vae), folder)
    return contents(folder)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Killed(LatentDiffusionModule):
    """Ends its process in the fourth batch, which is of the second shard."""

    batches = 0

    def encode_moments(self, batch):
        self.batches += 1
        if self.batches == 4:
            os._exit(9)
        return super().encode_moments(batch)


def test_a_cache_that_was_killed_and_continued_is_the_uninterrupted_one(vae, whole, tmp_path):
    module = encoder(vae, Killed)
    process = get_context("fork").Process(target=write, args=(module, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 9
    left = contents(tmp_path)
    assert left.keys() == {"train/latents-00001.safetensors"}
    with pytest.raises(ValueError, match="has no index"):
        CachedLatents(str(tmp_path)).setup()

    changed = (tmp_path / "train/latents-00001.safetensors").stat().st_mtime_ns
    write(encoder(vae), tmp_path)
    assert contents(tmp_path) == whole
    assert (tmp_path / "train/latents-00001.safetensors").stat().st_mtime_ns == changed


def test_a_damaged_shard_is_written_again(vae, whole, tmp_path, caplog):
    write(encoder(vae), tmp_path)
    for number, change in enumerate((lambda x: x[:-3], lambda x: x[:-1] + b"\x01")):
        path = tmp_path / f"train/latents-0000{number + 1}.safetensors"
        path.write_bytes(change(path.read_bytes()))
    (tmp_path / "validation/latents-00001.safetensors").unlink()
    write(encoder(vae), tmp_path)
    assert contents(tmp_path) == whole
    assert caplog.text.count("written again") == 2


class OfRanks(LatentDiffusionModule):
    """Notes which rank has encoded which samples."""

    def encode_moments(self, batch):
        (self.noted / f"{torch.distributed.get_rank()} {batch['image'].mean():.6f}").touch()
        return super().encode_moments(batch)


@pytest.mark.parametrize("shard_size", [4, 100])
def test_two_ranks_write_disjoint_shards_of_the_cache_of_one(vae, whole, tmp_path, shard_size):
    module = encoder(vae, OfRanks)
    module.noted = tmp_path / "noted"
    module.noted.mkdir()
    trainer = quiet_trainer(devices=2, strategy="ddp_fork")
    write(module, tmp_path / "cache", trainer=trainer, shard_size=shard_size)
    if shard_size == 4:
        assert contents(tmp_path / "cache") == whole
    CachedLatents(str(tmp_path / "cache"), batch_size=4, verify=True).setup()
    noted = [path.name.split() for path in module.noted.iterdir()]
    assert {rank for rank, _ in noted} == {"0", "1"}
    assert len({batch for _, batch in noted}) == len(noted) == 7


class Augmented(Pictures):
    """Pictures to which noise is added each time."""

    def build_datasets(self):
        train, validation = super().build_datasets()
        take = type(train).__getitem__

        class Noisy(type(train)):
            def __getitem__(self, index):
                sample = take(self, index)
                return sample | {"image": sample["image"] + torch.rand(())}

        train.__class__ = Noisy
        return train, validation


class Unreadable(Pictures):
    """A data module without validation data."""

    def val_dataloader(self):
        return []


@pytest.fixture
def cache(vae, tmp_path):
    write(encoder(vae), tmp_path / "cache")
    return tmp_path / "cache"


def test_what_does_not_go_into_a_cache_is_refused_in_one_line(vae, cache, tmp_path):
    save_autoencoder(tmp_path / "other", seed=1)
    refused = [
        (encoder(tmp_path / "other"), {}, "of one autoencoder and one data set, but .* identity"),
        (encoder(vae), {"data": Pictures(seed=1)}, "of one autoencoder and one data set"),
        (encoder(vae), {"shard_size": 5}, "of one autoencoder and one data set"),
        (encoder(vae), {"dtype": "float16"}, "of one autoencoder and one data set"),
        (encoder(vae), {"data": Augmented()}, "the same sample each time.*random augmentation"),
        (encoder(vae), {"data": Unreadable()}, "one DataLoader of a map-style data set for valid"),
        (encoder(vae), {"batch_size": 0}, "`batch_size` must be"),
        (encoder(vae), {"shard_size": 0}, "`shard_size` must be"),
        (encoder(vae), {"dtype": "int8"}, "`dtype` must be"),
        (DiffusionModule(small_unet()), {}, "`model` must be a LatentDiffusionModule"),
    ]
    before = contents(cache)
    for module, options, reason in refused:
        with pytest.raises(ValueError, match=reason) as error:
            write(module, cache, **options)
        assert "\n" not in str(error.value)
    assert contents(cache) == before


def test_half_the_space_holds_the_numbers_rounded(vae, cache, tmp_path):
    write(encoder(vae), tmp_path / "half", dtype="float16")
    rows = []
    for folder in (cache, tmp_path / "half"):
        data = CachedLatents(str(folder), batch_size=4, posterior="mean")
        data.setup()
        rows.append(torch.stack([data.train_dataset[i]["x0"] for i in range(10)]))
    assert torch.equal(rows[0].half().float(), rows[1])


def test_the_command_line_caches_trains_and_draws_pictures(
    vae, whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    network = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    network |= {**blocks, "block_out_channels": [8], "norm_num_groups": 4}
    model = {
        "class_path": "LatentDiffusionModule",
        "init_args": {
            "network": {"class_path": "diffusers.UNet2DModel", "init_args": network},
            "autoencoder": {"path": str(vae)},
            "sigma_data": "auto",
        },
    }
    callbacks = ["TargetVariance", "EMA", "SampleGrid", "ModelCheckpoint"]
    trainer = {"callbacks": [{"class_path": name} for name in callbacks]}
    trainer["callbacks"][-1]["init_args"] = {"save_last": True}
    trainer["callbacks"][-2]["init_args"] = {"samples": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
    config = ["--config", "config.yaml", "--trainer.accelerator=cpu"]
    quiet = [*config, "--trainer.enable_progress_bar=false"]
    data = ["--data", "support.latents.Pictures"]
    main(["cache", *quiet, *data, "--path=latents", "--shard_size=4", "--batch_size=2"])
    assert contents(tmp_path / "latents") == whole

    steps = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    latents = ["--data=CachedLatents", "--data.path=latents", "--data.batch_size=4"]
    main(["fit", *quiet, *latents, *steps])
    (last,) = tmp_path.rglob("last.ckpt")
    written = last.parents[1] / "config.yaml"
    main(["predict", "--config", str(written), "--ckpt_path=last", "--num_samples=2"])
    (samples,) = tmp_path.rglob("samples.npz")
    index = json.loads(whole["index.json"])
    assert index["identity"]["shard_size"] == 4
    assert samples.stat().st_size > 0


class Stopped(LatentDiffusionModule):
    """Asks its own process to stop in the third batch, the first of a shard."""

    batches = 0

    def encode_moments(self, batch):
        self.batches += 1
        if self.batches == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().encode_moments(batch)


def test_a_cache_stops_when_it_is_asked_to(vae, tmp_path):
    module = encoder(vae, Stopped)
    with pytest.raises(SIGTERMException):
        write(module, tmp_path)
    assert module.batches == 3
    assert contents(tmp_path).keys() == {"train/latents-00001.safetensors"}
