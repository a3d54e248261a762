"""The arithmetic of tensor cores, emulated: sums that are cut off, and what they do to weights."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples/scale/tensor_cores.py"


@pytest.fixture(scope="module")
def example():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE), run_name="tensor_cores"))


def test_three_products_of_halves_have_the_digits_of_float32(example):
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 96, generator=source), torch.randn(96, 8, generator=source)
    high, low = example.halves(x)
    assert torch.equal(high + low, x)
    assert int((high.view(torch.int32) & 0x1FFF).abs().max()) == 0
    assert float((low / x).abs().max()) <= 2**-11

    exact = x.double() @ y.double()
    rounded, cut = (example.three_passes(x, y, cuts=cuts) for cuts in (False, True))
    single = example.emulated(x, y, cuts=False)
    assert float((single.double() - exact).abs().max()) > 1e-3
    assert float((rounded.double() - exact).abs().max()) < 1e-5
    # sums of positive terms are too small if bits are cut off
    positive = example.emulated(x.abs(), y.abs(), cuts=True)
    assert bool((positive <= example.emulated(x.abs(), y.abs(), cuts=False)).all())
    assert float((cut.double() - exact).abs().max()) < 1e-4


def test_sums_that_are_cut_off_are_too_rough_for_logits_unless_they_are_short(example):
    single, rounded, cut, kernel = example.logit_errors(1.0, 55.0, 1024)
    assert single < 2
    assert rounded < 4
    assert cut > 10
    assert kernel < 3
