"""Products in tensor cores: when they are used, what happens where they cannot be, their digits.

Those of the kernel itself need Triton, as in ``pip install triton``; its interpreter and compiler
need no GPU.
"""

import logging
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_vr.core.rng import generator
from lightning_vr.posterior import tensor_cores
from lightning_vr.posterior.tensor_cores import exact_products, product

CUDA = torch.device("cuda")
KERNEL = "lightning_vr.posterior.tensor_core_kernel"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def precision():
    """torch's setting for products of float32, which tests change."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9")
@pytest.mark.parametrize(
    ("allowed", "dtype", "expected"),
    [
        ("highest", torch.float32, torch.matmul),
        ("high", torch.float32, product),
        ("medium", torch.float32, product),
        ("high", torch.float64, torch.matmul),
    ],
)
def test_they_are_used_where_tf32_is_allowed_and_torch_never_uses_it(
    precision, monkeypatch, allowed, dtype, expected
):
    monkeypatch.setattr(tensor_cores, "_are_right", lambda device: True)
    precision(allowed)
    with exact_products(SimpleNamespace(device=CUDA, dtype=dtype)) as used:
        assert used is expected
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == allowed
    assert torch.backends.cuda.matmul.allow_tf32 == (allowed != "highest")


def test_on_the_cpu_products_are_torchs(precision):
    precision("high")
    with exact_products(torch.ones(2, 3)) as used:
        assert used is torch.matmul


def in_tf32(x, y):
    """A product of factors that are cut to ten bits."""
    return (x.view(torch.int32) & -8192).view(torch.float32) @ y


def with_long_sums(x, y):
    """Three products of halves, whose sums are cut off."""
    example = Path(__file__).parents[2] / "examples/scale/tensor_cores.py"
    return runpy.run_path(str(example))["three_passes"](x, y, cuts=True)


def without_triton(x, y):
    raise ImportError("No module named 'triton'")


@pytest.mark.parametrize(
    ("way", "capability", "reason"),
    [
        (torch.matmul, (9, 0), None),
        (torch.matmul, (7, 5), ""),
        (in_tf32, (9, 0), "they err by"),
        (with_long_sums, (9, 0), "they err by"),
        (without_triton, (9, 0), "ImportError: No module named 'triton'"),
    ],
)
def test_a_first_product_decides_and_float32_is_the_fallback(
    monkeypatch, caplog, way, capability, reason
):
    monkeypatch.setattr(tensor_cores, "product", way)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.WARNING):
        assert tensor_cores._are_right.__wrapped__(torch.device("cpu")) == (reason is None)
    assert bool(caplog.records) == bool(reason)
    assert (reason or "") in caplog.text


@pytest.mark.parametrize(
    ("queries", "dim", "count", "processors"),
    [
        (0, 3, 2, 1),
        (2, 3, 0, 1),
        (1, 1, 1, 1),
        (5, 64, 7, 1),
        (65, 100, 129, 1),
        (64, 1100, 130, 9),
        (130, 1500, 33, 132),
    ],
)
def test_the_kernel_multiplies_matrices_of_any_size(monkeypatch, queries, dim, count, processors):
    pytest.importorskip("triton", minversion="3.7")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # on the CPU
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    monkeypatch.setattr(tensor_cores, "_processors", lambda device: processors)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(queries, dim, generator=source)
    y = torch.randn(count, dim, generator=source)
    exact = x.double() @ y.double().T
    size = torch.finfo(x.dtype).eps * x.norm(dim=1)[:, None] * y.norm(dim=1)
    for factor in (y.T, y.T.contiguous()):
        found = product(x, factor)
        assert bool(((found.double() - exact).abs() < 3 * size).all())
        # rows of a larger tensor, as those of a chunk are
        assert torch.equal(product(torch.cat([x, x])[queries:], factor), found)
    sys.modules.pop(KERNEL)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("stride", ["y_term", "y_column"])
def test_compiled_sums_of_32_terms_are_added_up_outside_of_tensor_cores(capability, stride):
    pytest.importorskip("triton", minversion="3.7")
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_vr.posterior.tensor_core_kernel import products

    names = products.arg_names
    constants = {"x_term": 1, stride: 1, "ROWS": 128, "COLUMNS": 128, "TERMS": 32}
    types = {name: "*fp32" if name in ("x", "y", "out") else "i32" for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(products, types, {(names.index(k),): v for k, v in constants.items()})
    code = compiled(source, GPUTarget("cuda", capability, 32), {"num_warps": 8}).asm["ttgir"]
    loop = code[code.index("scf.for") :]
    assert len(re.findall(r"(?:tt.dot|ttng.warp_group_dot) ", loop)) == 3
    (total,) = re.findall(r"(%\S+) = arith.addf .*#mma>", loop)
    assert re.search(rf"scf.yield .*{re.escape(total)}\b", loop)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("rows", [5, 128, 300])
def test_on_a_gpu_the_kernel_errs_as_little_as_float32(rows):
    assert tensor_cores._are_right(CUDA)
    source = generator("kernel", device="cuda")
    x = torch.randn(rows, 3072, generator=source, device="cuda") + 1
    y = torch.randn(4096, 3072, generator=source, device="cuda") + 1
    exact = x.double() @ y.double().T
    for factor in (y.T, y.T.contiguous()):
        errors = [
            (way(x, factor).double() - exact).square().mean() for way in (product, torch.matmul)
        ]
        assert float(errors[0]) < 4 * float(errors[1])
