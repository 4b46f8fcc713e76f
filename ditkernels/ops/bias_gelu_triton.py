"""The Triton kernels of ``bias_gelu``. Names and formulas are those at the top of bias_gelu.py.

    forward_tiles     a program owns ``ROWS`` rows and ``COLUMNS`` channels of one sample: reads x, writes y. 2 passes.

    backward_tiles    a program owns ``COLUMNS`` channels of one chunk of the rows of one sample and walks through it, ``ROWS`` rows
                      at a time: reads dy and x, writes dx. 3 passes. It adds up Σ dx in fp32, row by row of its tile, and writes
                      the sum to partial sums (B·chunks, D), fp32; without a bias there are none.

    add_samples       of _rows_triton.py brings the partial sums together: dbias.

Arithmetic is fp32 on values widened after the load. Nothing is added atomically, no two programs write one element, and the number
of chunks depends on shapes alone: same inputs, same bits.

Samples that follow each other without a gap are taken as one long sample, so that short ones fill a tile. Tensors are read in
place at any strides. Offsets are 64-bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops import _triton
from ditkernels.ops._rows_triton import (
    add_samples,
    channels_of,
    contiguous,
    load_piece,
    mask_of,
    or_empty,
    over_rows,
    rows_of,
)
from ditkernels.ops._triton import Tile, ceil_div, jit, packed, tl, with_strides
from ditkernels.ops.bias_gelu import BIAS_GELU, BIAS_GELU_BACKWARD, KAPPA, ROOT

COLUMNS = 128

# ------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------


@jit
def _sigmas(z, ROOT: tl.constexpr, KAPPA: tl.constexpr):  # type: ignore[no-untyped-def]
    """σ and σ'. The exponential is of a negative number: it overflows nowhere, and nothing cancels."""
    steep = 2.0 * ROOT * z * (1.0 + KAPPA * z * z)
    small = tl.exp(-tl.abs(steep))
    nearer = 1.0 / (1.0 + small)
    farther = small * nearer
    return tl.where(steep >= 0.0, nearer, farther), nearer * farther


@jit
def _biased(lines, bias, columns, mask, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """z = x + bias in fp32."""
    z = load_piece(lines, columns, mask).to(tl.float32)
    if bias is not None:
        z += channels_of(bias, columns, END, D)
    return z


@jit
def forward_tiles(  # type: ignore[no-untyped-def]
    x,
    bias,
    y,
    N,
    blocks,
    D: tl.constexpr,
    ROOT: tl.constexpr,
    KAPPA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    across: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    columns = ((program % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    block = program // across
    sample = (block // blocks).to(tl.int64)
    rows = ((block % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = mask_of(rows < N, columns, across * COLUMNS, D)
    z = _biased(rows_of(x, sample, rows), bias, columns, mask, across * COLUMNS, D)
    sigma, _ = _sigmas(z, ROOT, KAPPA)
    tl.store(y + (sample * N + rows) * D + columns, (z * sigma).to(y.dtype.element_ty), mask)


@jit
def backward_tiles(  # type: ignore[no-untyped-def]
    dy,
    x,
    bias,
    dx,
    partial,
    N,
    chunks,
    chunk_rows,
    D: tl.constexpr,
    ROOT: tl.constexpr,
    KAPPA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    across: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    columns = ((program % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    chunk = program // across
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * chunk_rows
    last = tl.minimum(first + chunk_rows, N)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = mask_of(rows < last, columns, across * COLUMNS, D)
        gradient = load_piece(rows_of(dy, sample, rows), columns, mask).to(tl.float32)
        z = _biased(rows_of(x, sample, rows), bias, columns, mask, across * COLUMNS, D)
        sigma, bend = _sigmas(z, ROOT, KAPPA)
        slope = sigma + z * bend * (2.0 * ROOT) * (1.0 + 3.0 * KAPPA * z * z)
        d = gradient * slope
        tl.store(dx + (sample * N + rows) * D + columns, d.to(dx.dtype.element_ty), mask)
        if partial is not None:
            total += d
    if partial is not None:
        inside = mask_of(columns >= 0, columns, across * COLUMNS, D)
        tl.store(partial + chunk.to(tl.int64) * D + columns, over_rows(total), inside)


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------

_PROGRAMS = 4096
_SHORTEST_CHUNK = 64
_SUM_CHUNKS, _SUM_COLUMNS = 32, 32


def tile(itemsize: int) -> Tile:
    """By the bytes of an element of the narrowest tensor: every access 16 bytes, and registers to spare."""
    return Tile(32, 4) if itemsize == 2 else Tile(16, 4)


def _narrowest(*tensors: Tensor) -> int:
    return min(tensor.element_size() for tensor in tensors)


def _joined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with all their samples as one, where each sample of each begins where the one before ends; else as they are."""
    batch, length, width = tensors[0].shape
    if batch == 1 or any(t.stride(0) != length * t.stride(1) for t in tensors):
        return tensors
    return tuple(t.as_strided((1, batch * length, width), (0, t.stride(1), t.stride(2))) for t in tensors)


def chunking(batch: int, length: int, width: int, rows: int) -> tuple[int, int]:
    """(chunks of a sample, rows of a chunk) from shapes alone: some thousand programs, but no chunk of a few rows."""
    others = max(batch, 1) * ceil_div(width, COLUMNS)
    wanted = max(1, min(ceil_div(_PROGRAMS, others), ceil_div(length, _SHORTEST_CHUNK)))
    chunk_rows = ceil_div(max(ceil_div(length, wanted), 1), rows) * rows
    return ceil_div(length, chunk_rows), chunk_rows


def _bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    y = contiguous(x)
    (joined,) = _joined(x)
    batch, length, width = joined.shape
    chosen = tile(x.element_size())
    blocks = ceil_div(length, chosen.rows)
    _triton.launch(
        forward_tiles,
        batch * blocks * ceil_div(width, COLUMNS),
        chosen,
        x.device,
        *(with_strides(joined), packed(bias), y, length, blocks),
        D=width,
        ROOT=ROOT,
        KAPPA=KAPPA,
        ROWS=chosen.rows,
        COLUMNS=COLUMNS,
    )
    return y


def _bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = contiguous(x)
    dy, x = _joined(dy, x)
    batch, length, width = x.shape
    chosen = tile(_narrowest(dy, x))
    chunks, chunk_rows = chunking(batch, length, width, chosen.rows)
    partial = None if bias is None else x.new_empty((batch * chunks, width), dtype=torch.float32)
    _triton.launch(
        backward_tiles,
        batch * chunks * ceil_div(width, COLUMNS),
        chosen,
        x.device,
        *(with_strides(dy), with_strides(x), packed(bias), dx, partial, length, chunks, chunk_rows),
        D=width,
        ROOT=ROOT,
        KAPPA=KAPPA,
        ROWS=chosen.rows,
        COLUMNS=COLUMNS,
    )
    return dx, or_empty(_added(partial, bias), x)


def _added(partial: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The sum over the chunks (chunks, D), in their order, in the bias' dtype."""
    if partial is None or bias is None:
        return None
    dbias = contiguous(bias)
    chunks, width = partial.shape
    _triton.launch(
        add_samples,
        ceil_div(width, _SUM_COLUMNS),
        Tile(1, 4),
        partial.device,
        *(partial, chunks, dbias, None, None),
        D=width,
        KINDS=1,
        SAMPLES=_SUM_CHUNKS,
        COLUMNS=_SUM_COLUMNS,
    )
    return dbias


# ------------------------------------------------------------------------------------------------------------------
# Registration
# ------------------------------------------------------------------------------------------------------------------


def _refuse(first: Tensor, *others: Tensor | None) -> str | None:
    # No program holds a whole row, so that a row may be of any width.
    return _triton.refuse(1, first, *others)


registry.implement(BIAS_GELU, "triton", _bias_gelu, refuse=_refuse)
registry.implement(BIAS_GELU_BACKWARD, "triton", _bias_gelu_backward, refuse=_refuse)
