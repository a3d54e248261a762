import numpy as np
import pytest
from PIL import Image

from lightning_vr.data.image_error import ImageError, MissingImageError
from lightning_vr.data.inspection import DECODED, evenly_spaced, inspect_images
from tests.support.images import random_picture


class Pictures:
    """Images by position, None for none; counts what is opened."""

    def __init__(self, *images):
        self.images = images
        self.opened = []

    def __len__(self):
        return len(self.images)

    def open(self, index):
        self.opened.append(index)
        if self.images[index] is None:
            raise MissingImageError
        return self.images[index].copy()

    def name(self, index):
        return f"number {index}"


def test_kinds_are_counted():
    clear, opaque = Image.new("LA", (4, 4), (0, 9)), Image.new("RGBA", (4, 4), "white")
    deep = Image.fromarray(np.zeros((4, 4), dtype=np.uint16))
    found = inspect_images(
        Pictures(random_picture(0), clear, None, opaque, deep, clear), is_shown=False
    )
    assert (found.opened, found.deep, found.decoded, found.transparent) == (6, 1, 3, 2)
    assert found.with_alpha == [1, 3, 5]
    assert found.missing == ["number 2"]


def test_few_transparent_images_are_decoded():
    source = Pictures(*[Image.new("LA", (4, 4))] * 100)
    found = inspect_images(source, is_shown=False)
    assert (found.opened, found.decoded) == (100, DECODED)
    assert len(source.opened) == 100 + DECODED


def test_image_of_unknown_range_is_named():
    source = Pictures(random_picture(0), Image.fromarray(np.zeros((4, 4), dtype=np.float32)))
    with pytest.raises(ImageError, match="Image number 1 has mode F"):
        inspect_images(source, is_shown=False)


@pytest.mark.parametrize(("count", "most"), [(3, 10), (10, 10), (1000, 10), (11, 10)])
def test_evenly_spaced_positions_are_distinct_and_no_more_than_wanted(count, most):
    positions = evenly_spaced(count, most)
    assert len(set(positions)) == len(positions) == min(count, most)
    assert positions[0] == 0
    assert positions[-1] < count
    gaps = np.diff(positions)
    assert gaps.max() - gaps.min() <= 1
