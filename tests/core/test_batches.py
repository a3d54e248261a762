"""Rows of batches in all the shapes that collate functions make."""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_vr.core.batches import batch_size, take_rows


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Bundle:
    x: Tensor
    name: str
    inner: dict


def x():
    return torch.arange(12.0).reshape(6, 2)


def y():
    return torch.arange(6)


SCALE = torch.tensor(3.0)
TABLE = torch.arange(4)

BATCHES = {
    "tensor": (x, lambda b: [b]),
    "tuple": (lambda: (x(), y()), list),
    "list": (lambda: [x(), y()], list),
    "named tuple": (lambda: Pair(x(), y()), list),
    "dictionary": (lambda: {"image": x(), "label": y()}, lambda b: list(b.values())),
    "default dictionary": (lambda: defaultdict(list, a=x(), b=y()), lambda b: list(b.values())),
    "nested": (lambda: {"a": (x(), {"b": [y()]})}, lambda b: [b["a"][0], b["a"][1]["b"][0]]),
    "dataclass": (lambda: Bundle(x(), "train", {"y": y()}), lambda b: [b.x, b.inner["y"]]),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_rows_of_every_tensor_are_taken_and_the_batch_keeps_its_kind(kind):
    build, tensors = BATCHES[kind]
    batch = build()
    assert batch_size(batch) == 6
    part = take_rows(batch, 2, 5)
    assert type(part) is type(batch)
    assert batch_size(part) == 3
    for taken, whole in zip(tensors(part), tensors(build()), strict=True):
        assert torch.equal(taken, whole[2:5])
    # the batch itself goes on to be trained on
    for kept, whole in zip(tensors(batch), tensors(build()), strict=True):
        assert torch.equal(kept, whole)


def test_halves_make_up_the_whole_and_rows_beyond_the_end_are_not_there():
    batch = {"x": x(), "y": y()}
    halves = [take_rows(batch, 0, 3), take_rows(batch, 3, 6)]
    assert torch.equal(torch.cat([half["x"] for half in halves]), x())
    assert torch.equal(take_rows(batch, 4, 100)["y"], torch.tensor([4, 5]))


def test_values_without_one_row_per_sample_stay_whole():
    batch = {"x": x(), "scale": SCALE, "table": TABLE, "epoch": 3, "split": "train", "none": None}
    part = take_rows(batch, 0, 2)
    assert part["x"].shape == (2, 2)
    assert part["scale"] is SCALE
    assert part["table"] is TABLE
    assert (part["epoch"], part["split"], part["none"]) == (3, "train", None)


def test_the_size_is_that_of_the_first_tensor_with_rows():
    assert batch_size((SCALE, x(), TABLE)) == 6


def test_captions_go_with_their_samples():
    samples = [{"image": row, "caption": f"picture {i}"} for i, row in enumerate(x())]
    batch = default_collate(samples)
    part = take_rows(batch, 1, 3)
    assert part["image"].shape == (2, 2)
    assert list(part["caption"]) == ["picture 1", "picture 2"]
    assert list(batch["caption"]) == [f"picture {i}" for i in range(6)]

    pair = default_collate([(row, f"picture {i}") for i, row in enumerate(x())])
    assert list(take_rows(pair, 4, 6)[1]) == ["picture 4", "picture 5"]
    assert take_rows({"x": x(), "tags": ["a", "b"]}, 0, 1)["tags"] == ["a", "b"]


@pytest.mark.parametrize("batch", [["a", "b"], {"scale": SCALE}, (), "text", None, 3])
def test_a_batch_without_rows_raises(batch):
    message = f"must hold a tensor with one row for each sample, got {type(batch)}"
    message = message.replace(str(type(batch)), type(batch).__name__)
    with pytest.raises(ValueError, match=message):
        batch_size(batch)
    with pytest.raises(ValueError, match=message):
        take_rows(batch, 0, 1)
