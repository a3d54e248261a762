import copy
import os
import pickle
import resource
import warnings
from multiprocessing import context

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_vr.data.folder import ImageFiles
from lightning_vr.data.images import DecodedImages
from lightning_vr.data.pixel_cache import PixelCache

SHAPE = (3, 4, 4)


def pixels(seed, kind=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, SHAPE, dtype=kind)


def cached_images(folder, count=6, **cache):
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(pixels(i).transpose(1, 2, 0)).save(path)
    options = {"is_deep": False, "max_bytes": 2**20} | cache
    memory = PixelCache(count, SHAPE, **options)
    source = ImageFiles(paths, None)
    return DecodedImages(source, None, None, size=4, channels=3, cache=memory)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_pixels_come_back_as_they_were_put(kind):
    cache = PixelCache(5, SHAPE, is_deep=True, max_bytes=2**20)
    assert cache.get(3) is None
    cache.put(3, pixels(0, kind))
    cache.put(4, pixels(1, np.uint8))
    for index, expected in ((3, pixels(0, kind)), (4, pixels(1))):
        found = cache.get(index)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    assert cache.get(2) is None


def test_what_comes_back_is_a_copy():
    cache = PixelCache(1, SHAPE, is_deep=False, max_bytes=2**20)
    cache.put(0, pixels(0))
    cache.get(0)[:] = 0
    assert np.array_equal(cache.get(0), pixels(0))


def test_all_pixels_are_given_where_they_are_once_all_are_here_with_8_bits():
    cache = PixelCache(2, SHAPE, is_deep=True, max_bytes=2**20)
    cache.put(0, pixels(0))
    assert cache.whole() is None
    cache.put(1, pixels(1))
    whole = cache.whole()
    assert np.array_equal(whole.numpy(), np.stack([pixels(0), pixels(1)]))
    cache.put(1, pixels(2))
    assert np.array_equal(whole[1].numpy(), pixels(2))

    cache.put(1, pixels(1, np.uint16))
    assert cache.whole() is None
    few = PixelCache(2, SHAPE, is_deep=False, max_bytes=60)
    few.put(0, pixels(0))
    assert few.whole() is None


def test_pixels_of_16_bits_that_have_no_room_are_not_kept():
    cache = PixelCache(1, SHAPE, is_deep=False, max_bytes=2**20)
    cache.put(0, pixels(0, np.uint16))
    assert cache.get(0) is None


@pytest.mark.parametrize(
    ("max_bytes", "capacity"), [(0, 0), (48, 0), (49, 1), (97, 1), (98, 2), (10**9, 7)]
)
def test_memory_stays_within_its_bound(max_bytes, capacity):
    cache = PixelCache(7, SHAPE, is_deep=False, max_bytes=max_bytes)
    assert cache.capacity == capacity
    assert cache.bytes <= max_bytes
    for index in range(7):
        cache.put(index, pixels(index))
        assert (cache.get(index) is not None) == (index < capacity)


def test_memory_grows_as_it_is_filled():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = PixelCache(2**30, SHAPE, is_deep=False, max_bytes=2**33)
    cache.put(cache.capacity - 1, pixels(0))
    assert cache.get(cache.capacity - 1) is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**17  # in KiB


def test_file_descriptor_is_closed_with_the_cache():
    cache = PixelCache(1, SHAPE, is_deep=False, max_bytes=2**20)
    descriptor = cache._file
    os.fstat(descriptor)
    del cache
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_hold_no_pixels_and_give_the_same_samples(tmp_path, again):
    data = cached_images(tmp_path)
    expected = [data[i]["image"] for i in range(6)]
    assert len(pickle.dumps(data)) < 10_000
    copied = again(data)
    for _ in range(2):
        assert all(torch.equal(copied[i]["image"], expected[i]) for i in range(6))


class Spawning:
    """What starts a process, as far as it can be without one."""

    DupFd = staticmethod(lambda descriptor: Duplicate(descriptor))
    duplicate_for_child = staticmethod(os.dup)


class Duplicate:
    def __init__(self, descriptor):
        self.descriptor = descriptor

    def detach(self):
        return self.descriptor


def test_copy_for_a_new_process_shares_the_memory(tmp_path):
    data = cached_images(tmp_path)
    context.set_spawning_popen(Spawning())
    try:
        pickled = pickle.dumps(data)
    finally:
        context.set_spawning_popen(None)
    child = pickle.loads(pickled)
    expected = child[1]["image"], data[4]["image"]
    for path in data.source.paths:
        path.unlink()
    assert torch.equal(data[1]["image"], expected[0])
    assert torch.equal(child[4]["image"], expected[1])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_what_any_of_them_has_decoded(tmp_path, method):
    data = cached_images(tmp_path)
    expected = [data.decode(i) for i in range(3)]  # in this process
    options = {"batch_size": 3, "num_workers": 1, "multiprocessing_context": method}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks of processes with threads
        first = torch.cat([batch["image"] for batch in DataLoader(data, **options)])
        for path in data.source.paths:
            path.unlink()
    assert torch.equal(first[:3], torch.stack(expected))
    again = torch.stack([data[i]["image"] for i in range(6)])  # the files are gone
    assert torch.equal(again, first)


def test_without_anonymous_files_forked_workers_share_it_still(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    data = cached_images(tmp_path)
    loader = DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context="fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        first = torch.cat([batch["image"] for batch in loader])
    for path in data.source.paths:
        path.unlink()
    assert torch.equal(torch.stack([data[i]["image"] for i in range(6)]), first)


def test_row_whose_writer_was_killed_is_decoded_again(tmp_path):
    data = cached_images(tmp_path)
    data.cache._rows[2] = 7  # pixels without the mark, which is written last
    assert torch.equal(data[2]["image"], cached_images(tmp_path)[2]["image"])
