"""What logits err by if their products are formed in tensor cores: an emulation on the CPU.

    python examples/scale/tensor_cores.py

Each factor is split as ``x = high + low``, where ``high`` has the 10 bits of mantissa of TF32 and
``|low| <= 2^-11 |x|``; then ``x y`` is ``low high + high low + high high`` up to ``2^-22 |x y|``
(Ootomo and Yokota 2022, arXiv 2203.03341). What decides is the sum: tensor cores cut off the bits
that do not fit into a float32 sum where other units round them, after every 8 terms.
``lightning_vr/posterior/tensor_cores.py`` therefore sums 32 terms at most there. Its time and error
on a GPU are in the table of ``scale_on_gpu.py``.
"""

import torch
from torch import Tensor

from lightning_vr.core.rng import generator

MANTISSA_CUT = 13
"""Bits of float32's mantissa that TF32 does not have."""

TERMS = 8
"""Terms that are added to a sum at a time."""

PIECE = 32
"""Terms that the kernel sums in tensor cores."""


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``high``, rounded to TF32, and ``low``, the rest of ``x`` in float32."""
    half = 1 << (MANTISSA_CUT - 1)
    bits = (x.contiguous().view(torch.int32) + half) & -(1 << MANTISSA_CUT)
    high = bits.view(torch.float32)
    return high, x - high


def emulated(x: Tensor, y: Tensor, *, cuts: bool, total: Tensor | None = None) -> Tensor:
    """Return ``total + x @ y`` as tensor cores do: TF32 factors, exact products, float32 sums.

    Args:
        x: ``(B, d)``.
        y: ``(d, c)``.
        cuts: Whether sums are cut off, as in tensor cores, or rounded.
        total: What is added to ``(B, c)``; by default nothing.
    """
    wide, other = halves(x)[0].double(), halves(y)[0].double()
    total = torch.zeros(len(x), y.shape[1]) if total is None else total
    for first in range(0, x.shape[1], TERMS):
        part = wide[:, first : first + TERMS] @ other[first : first + TERMS]
        exact = total.double() + part
        total = exact.float()
        if cuts:
            beyond = total.double().abs() > exact.abs()
            total = torch.where(beyond, torch.nextafter(total, torch.zeros_like(total)), total)
    return total


def three_passes(x: Tensor, y: Tensor, *, cuts: bool) -> Tensor:
    """Return ``x @ y`` by three products of halves, the small ones first."""
    (high, low), (other_high, other_low) = halves(x), halves(y)
    small = emulated(high, other_low, cuts=cuts, total=emulated(low, other_high, cuts=cuts))
    return emulated(high, other_high, cuts=cuts, total=small)


def as_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` by cut sums of a few terms, which are added up where sums are rounded."""
    parts = zip(x.split(PIECE, dim=1), y.split(PIECE), strict=True)
    return sum((three_passes(a, b, cuts=True) for a, b in parts), torch.zeros(len(x), y.shape[1]))


def logit_errors(noise: float, norm: float, dim: int = 3072) -> list[float]:
    """Return rms errors of logits in units of ``eps s``.

    They are those of a sample's logit less that of another of the same norm: what all share is no
    error.

    Returns:
        Those of float32, of three passes by rounded sums, by cut sums, and as in the kernel.
    """
    source = generator("tensor cores")
    x = torch.nn.functional.normalize(torch.randn(64, dim, generator=source), dim=1) * norm
    xt = x[:16] + noise * torch.randn(16, dim, generator=source)
    exact = xt.double() @ x.double().T
    size = torch.finfo(torch.float32).eps * norm**2
    passes = (three_passes(xt, x.T, cuts=cuts) for cuts in (False, True))
    found = []
    for way in (xt @ x.T, *passes, as_kernel(xt, x.T)):
        error = (way.double() - exact) / size
        error = error.diagonal()[:, None] - error[:, 16:]
        found.append(float(error.square().mean().sqrt()))
    return found


def main():
    print("rms error of a logit, in units of eps s, for samples of norm 55 in 3,072 dimensions\n")
    heads = ("float32", "TF32 x 3", "and cut", "kernel")
    print(f"{'norm / noise':>14} " + " ".join(f"{head:>10}" for head in heads))
    for noise in (0.05, 1.0, 5.0):
        errors = logit_errors(noise, 55.0)
        print(f"{55 / noise:14.0f} " + " ".join(f"{error:10.2f}" for error in errors))


if __name__ == "__main__":
    main()
