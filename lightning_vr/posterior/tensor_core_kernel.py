"""The kernel of ``tensor_cores.py``. It needs Triton, which torch brings where it has CUDA."""

import triton
import triton.language as tl


@triton.jit
def _halves(x):
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 4096) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def products(
    x,
    y,
    out,
    rows,
    columns,
    terms,
    part,
    x_row,
    x_term,
    y_term,
    y_column,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    TERMS: tl.constexpr,  # noqa: N803
):
    """Write ``x @ y``, a tile of ``(ROWS, COLUMNS)`` for each program and each ``part`` of terms.

    ``x`` is ``(rows, terms)`` and ``y`` ``(terms, columns)``, each with its strides; ``out`` gets
    the sums over a part of the terms each, ``(parts, rows, columns)``.
    """
    # programs that share references run next to each other
    tiles = (rows + ROWS - 1) // ROWS
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    first = tl.program_id(1) * part
    last = tl.minimum(terms, first + part)
    term = first + tl.arange(0, TERMS)
    x_at = x + row[:, None].to(tl.int64) * x_row + term[None, :].to(tl.int64) * x_term
    y_at = y + term[:, None].to(tl.int64) * y_term + column[None, :].to(tl.int64) * y_column
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(first, last, TERMS):
        is_term = start + tl.arange(0, TERMS) < last
        x_high, x_low = _halves(tl.load(x_at, is_row[:, None] & is_term[None, :], 0.0))
        y_high, y_low = _halves(tl.load(y_at, is_term[:, None] & is_column[None, :], 0.0))
        few = tl.dot(x_low, y_high, input_precision="tf32")
        few = tl.dot(x_high, y_low, few, input_precision="tf32")
        few = tl.dot(x_high, y_high, few, input_precision="tf32")
        total += few  # outside of the tensor cores: this rounds, they cut off
        x_at += TERMS * x_term
        y_at += TERMS * y_term
    place = (tl.program_id(1) * rows + row[:, None]).to(tl.int64) * columns + column[None, :]
    tl.store(out + place, total, is_row[:, None] & is_column[None, :])
