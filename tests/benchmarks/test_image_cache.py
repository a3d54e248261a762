"""Images from memory, against images that are decoded on every access.

Run with ``pytest tests/benchmarks --benchmark-only -s -n 0``; figures are printed, not asserted.
"""

import torch

from lightning_vr.data import ImageFolder
from tests.support.images import random_picture

COUNT, SIDE, SIZE = 64, 256, 64


def test_speed_against_decoding_on_every_access(compare, benchmark, tmp_path):
    for i in range(COUNT):
        random_picture(i, SIDE, SIDE).save(tmp_path / f"{i}.jpg")

    def training_set(**options):
        data = ImageFolder(tmp_path, size=SIZE, batch_size=8, **options)
        data.setup()
        return data.train_dataset

    kept, decoded = training_set(), training_set(cache_bytes=0)

    def read(data):
        return torch.stack([data[index]["image"] for index in range(len(data))])

    assert torch.equal(read(kept), read(decoded))
    ours, other = compare(
        lambda: read(kept),
        lambda: read(decoded),
        rounds=10,
        label=f"{len(kept)} images of {SIZE} pixels from memory, and from JPEG of {SIDE} pixels",
    )
    benchmark.extra_info["speed_up"] = other / ours
    print(f"{other / ours:.0f} times as fast")
