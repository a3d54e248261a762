"""Products of float32 matrices in tensor cores: three passes in TF32, and what they would err by.

    python examples/scale/tensor_cores.py

Each factor is split as ``x = high + low``, where ``high`` has the 10 bits of mantissa of TF32 and
``|low| <= 2^-11 |x|``; then ``x y`` is ``high high + high low + low high`` up to ``2^-22 |x y|``
(Ootomo and Yokota 2022, arXiv 2203.03341). What decides is the sum: tensor cores cut off the bits
that do not fit into a float32 sum where other units round them, after every 8 terms. The script
emulates both on the CPU for the logits of the posterior mean: cut sums err by 72 where float32 errs
by 0.9, so ``posterior_mean`` multiplies in float32. Sums of 64 terms, which float32 adds up, err by
1.7. ``scale_on_gpu.py`` measures time and error of ``product`` on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lightning_vr.core.rng import generator

MANTISSA_CUT = 13
"""Bits of float32's mantissa that TF32 does not have."""

TERMS = 8
"""Terms that are added to a sum at a time."""

PIECE = 64
"""Terms of a sum that is short enough to be cut off."""


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``high``, rounded to TF32, and ``low``, the rest of ``x`` in float32."""
    half = 1 << (MANTISSA_CUT - 1)
    bits = (x.contiguous().view(torch.int32) + half) & -(1 << MANTISSA_CUT)
    high = bits.view(torch.float32)
    return high, x - high


def product(x: Tensor, y: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return ``x @ y`` by three products of halves; small terms are added first."""
    (high, low), (other_high, other_low) = halves(x), halves(y)
    small = multiply(low, other_high) + multiply(high, other_low)
    return small.add_(multiply(high, other_high))


@contextmanager
def tf32() -> Iterator[None]:
    """Multiply float32 matrices in TF32 on CUDA."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def emulated(x: Tensor, y: Tensor, *, cuts: bool) -> Tensor:
    """Return ``x @ y`` as tensor cores do: TF32 factors, exact products, float32 sums.

    Args:
        x: ``(B, d)``.
        y: ``(d, c)``.
        cuts: Whether sums are cut off, as in tensor cores, or rounded.
    """
    wide, other = halves(x)[0].double(), halves(y)[0].double()
    total = torch.zeros(len(x), y.shape[1])
    for first in range(0, x.shape[1], TERMS):
        part = wide[:, first : first + TERMS] @ other[first : first + TERMS]
        exact = total.double() + part
        total = exact.float()
        if cuts:
            beyond = total.double().abs() > exact.abs()
            total = torch.where(beyond, torch.nextafter(total, torch.zeros_like(total)), total)
    return total


def in_pieces(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` by cut sums of a few terms, which are added up where sums are rounded."""
    parts = zip(x.split(PIECE, dim=1), y.split(PIECE), strict=True)
    return sum((emulated(a, b, cuts=True) for a, b in parts), torch.zeros(len(x), y.shape[1]))


def logit_errors(noise: float, norm: float, dim: int = 3072) -> list[float]:
    """Return rms errors of logits in units of ``eps s``.

    They are those of a sample's logit less that of another of the same norm: what all share is no
    error.

    Returns:
        Those of float32, of three passes by rounded sums, by cut sums, and by cut sums in pieces.
    """
    source = generator("tensor cores")
    x = torch.nn.functional.normalize(torch.randn(64, dim, generator=source), dim=1) * norm
    xt = x[:16] + noise * torch.randn(16, dim, generator=source)
    exact = xt.double() @ x.double().T
    size = torch.finfo(torch.float32).eps * norm**2
    sums = partial(emulated, cuts=False), partial(emulated, cuts=True), in_pieces
    ways = [xt @ x.T, *(product(xt, x.T, way) for way in sums)]
    found = []
    for way in ways:
        error = (way.double() - exact) / size
        error = error.diagonal()[:, None] - error[:, 16:]
        found.append(float(error.square().mean().sqrt()))
    return found


def main():
    print("rms error of a logit, in units of eps s, for samples of norm 55 in 3,072 dimensions\n")
    heads = ("float32", "TF32 x 3", "and cut", "in pieces")
    print(f"{'norm / noise':>14} " + " ".join(f"{head:>10}" for head in heads))
    for noise in (0.05, 1.0, 5.0):
        errors = logit_errors(noise, 55.0)
        print(f"{55 / noise:14.0f} " + " ".join(f"{error:10.2f}" for error in errors))


if __name__ == "__main__":
    main()
