"""A tiny autoencoder in a folder, pictures to encode, and caches that are made by hand."""

import diffusers
import torch

from lightning_vr.data import InMemoryDataset, SplitDataModule
from lightning_vr.data.latent_files import (
    INDEX,
    SPLITS,
    Identity,
    Index,
    Shard,
    Sums,
    expected_header,
    shard_bytes,
    shard_name,
)


def save_autoencoder(folder, seed=0, **options):
    """Save an autoencoder of pictures (1, 8, 8) whose latents are (2, 4, 4); return it."""
    settings = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [4, 4],
        "norm_num_groups": 2,
        "latent_channels": 2,
        "sample_size": 8,
        "mid_block_add_attention": False,
        "scaling_factor": 1.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = diffusers.AutoencoderKL(**(settings | options))
    model.save_pretrained(folder)
    return model.eval()


class Pictures(SplitDataModule):
    """Random pictures of two classes, 10 for training and 3 for validation."""

    shape, num_classes = (1, 8, 8), 2

    def __init__(self, batch_size=4, seed=0):
        super().__init__(batch_size, 0)
        self.seed = seed

    def build_datasets(self):
        source = torch.Generator().manual_seed(self.seed)
        x = torch.rand(13, 1, 8, 8, generator=source) * 2 - 1
        label = torch.arange(13) % 2
        parts = (slice(10), slice(10, None))
        return tuple(
            InMemoryDataset(x[part], label[part], key="image", num_classes=2) for part in parts
        )


def write_cache(folder, mean, std, shard_size=4, autoencoder="", **columns):
    """Write a cache whose training and validation parts are the same posteriors ``(n, *)``."""
    identity = Identity(autoencoder, "", "", shard_size, "float32")
    rows = {"mean": mean, "std": std, **columns}
    shards, sums = {}, {}
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        sums[split], shards[split] = Sums.of(mean, std), []
        for number, first in enumerate(range(0, len(mean), shard_size)):
            part = {name: x[first : first + shard_size].contiguous() for name, x in rows.items()}
            samples, name = len(part["mean"]), shard_name(split, number)
            header = expected_header(identity, first, samples)
            (folder / name).write_bytes(shard_bytes(part, header))
            shards[split].append(Shard(name, first, samples, (folder / name).stat().st_size))
    classes = int(columns["label"].max()) + 1 if "label" in columns else None
    (folder / INDEX).write_text(Index(identity, classes, shards, sums).to_json())
