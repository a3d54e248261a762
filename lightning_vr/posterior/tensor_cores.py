"""Products of float32 matrices in tensor cores that err as little as those of float32 units.

Logits are small differences of large products: with the ten bits of TF32, weights at low noise
would be wrong by a factor. So each factor is split as ``x = high + low`` with ``high`` in TF32 and
``|low| <= 2^-11 |x|``, and ``x y`` is ``low high + high low + high high`` up to ``2^-22 |x y|``
(Ootomo and Yokota 2022, arXiv 2203.03341). Tensor cores cut off the bits of their sums that do not
fit, where float32 units round them, so they sum no more than 32 terms; those sums are added up
outside. Emulated (``examples/scale/tensor_cores.py``), a logit errs by 1.5 where float32's errs by
0.7 to 0.9, in units of ``eps s`` as in ``low_noise.py``, which allows for 4.

They are used on CUDA where ``torch.set_float32_matmul_precision`` allows TF32, Triton is there and
a first product is right; elsewhere products are in float32, whatever that says.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_vr.core.rng import generator

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]

log = logging.getLogger(__name__)

_COLUMNS, _TERMS = 128, 32
_FEWEST_TERMS = 512
"""Terms of a program that are worth its start."""

_ERROR = 16
"""Error of the first product, in units of eps and the norms of its factors, that is not right."""

_OLD_FLAG = ("allow_tf32", False)


@contextmanager
def exact_products(x: Tensor) -> Iterator[Product]:
    """Yield what multiplies ``x`` with another matrix, whatever torch is set to do with float32."""
    if x.device.type != "cuda":
        yield torch.matmul
        return
    # up to torch 2.8 there is only a flag; later versions do not read it once both were set
    matmul: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else _OLD_FLAG
    kept = getattr(matmul, name)
    is_allowed = kept in ("tf32", True) and x.dtype == torch.float32
    setattr(matmul, name, exact)
    try:
        yield product if is_allowed and _are_right(x.device) else torch.matmul
    finally:
        setattr(matmul, name, kept)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` of float32 matrices ``(B, d)`` and ``(d, c)``, on a CUDA device."""
    from lightning_vr.posterior.tensor_core_kernel import products

    (rows, terms), columns = x.shape, y.shape[1]
    if rows * columns * terms == 0:
        return x @ y
    height = 64 if rows <= 64 else 128
    tiles = -(-rows // height) * -(-columns // _COLUMNS)
    # few tiles are divided, until all processors have one; the same way each time
    parts = max(1, min(_processors(x.device) // tiles, terms // _FEWEST_TERMS))
    part = -(-terms // (parts * _TERMS)) * _TERMS
    out = x.new_empty(-(-terms // part), rows, columns)
    # Triton launches on the current device
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        products[tiles, len(out)](
            x, y, out, rows, columns, terms, part, *x.stride(), *y.stride(),
            ROWS=height, COLUMNS=_COLUMNS, TERMS=_TERMS, num_warps=height // 16,
        )  # fmt: skip
    return out[0] if len(out) == 1 else out.sum(0)


@lru_cache
def _processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@lru_cache
def _are_right(device: torch.device) -> bool:
    """Compare a first product with float64; say why if there is none, or a wrong one."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    source = generator("tensor cores", device=device)
    # of positive terms the bits that are cut off add up
    x, y = (torch.rand(130, 3072, generator=source, device=device) for _ in range(2))
    try:
        error = (product(x, y.T).double() - x.double() @ y.T.double()).abs().max()
        size = torch.finfo(x.dtype).eps * x.norm(dim=1).max() * y.norm(dim=1).max()
        reason = f"they err by {float(error / size):.3g} eps"
        is_right = bool(error <= _ERROR * size)
    except Exception as raised:  # whatever a compiler may raise
        reason, is_right = f"{type(raised).__name__}: {raised}", False
    if not is_right:
        log.warning("References are compared in float32, not in tensor cores: %s", reason)
    return is_right
