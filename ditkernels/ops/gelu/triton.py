"""The Triton kernels of ``bias_gelu``. Names and formulas are those at the top of __init__.py.

    forward_tiles     A program owns ``ROWS`` rows and ``COLUMNS`` channels of one sample. It reads x and writes y: 2 passes.

    backward_tiles    A program owns ``COLUMNS`` channels of one chunk of the rows of one sample and walks through it, ``ROWS`` rows
                      at a time. It reads dy and x and writes dx: 3 passes, 2 where dx is not wanted. If dbias is wanted, it sums dx
                      in fp32, separately for each row of its tile until the end, and writes partial sums (B·chunks, D), fp32.

    add_samples       (in _rows.py) adds the partial sums: dbias.

Arithmetic is fp32 on values that are widened after the load. The same inputs give the same bits: nothing is added atomically, no
two programs write one element, and the number of chunks depends on shapes, strides and dtypes alone.

Samples that are adjacent in memory are merged into one long sample, so that short samples fill a tile. The kernels read tensors in
place at any strides. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._rows import add_samples, channels_of, contiguous, load_piece, mask_of, over_rows, rows_of
from ditkernels.ops._triton import Tile, ceil_div, jit, packed, remembered_by_shape, tl
from ditkernels.ops.gelu import BIAS_GELU, KAPPA, ROOT
from ditkernels.ops.spec import Wanted

COLUMNS = 128

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def _sigmas(z, ROOT: tl.constexpr, KAPPA: tl.constexpr):  # type: ignore[no-untyped-def]
    """σ and σ' = σ·(1 − σ), without a 1 − σ that could cancel. The exponential cannot overflow: its argument is never positive."""
    double_u = 2.0 * ROOT * z * (1.0 + KAPPA * z * z)
    small = tl.exp(-tl.abs(double_u))
    nearer = 1.0 / (1.0 + small)
    farther = small * nearer
    return tl.where(double_u >= 0.0, nearer, farther), nearer * farther


@jit
def _biased(lines, bias, columns, mask, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """z = x + bias in fp32."""
    z = load_piece(lines, columns, mask).to(tl.float32)
    if bias is not None:
        z += channels_of(bias, columns, END, D)
    return z


@jit
def forward_tiles(  # type: ignore[no-untyped-def]
    x, x_b, x_n, x_d, bias, y, N, blocks,
    D: tl.constexpr, ROOT: tl.constexpr, KAPPA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    end: tl.constexpr = column_blocks * COLUMNS
    columns = ((program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    block = program // column_blocks
    sample = (block // blocks).to(tl.int64)
    rows = ((block % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = mask_of(rows < N, columns, end, D)
    z = _biased(rows_of((x, x_b, x_n, x_d), sample, rows), bias, columns, mask, end, D)
    sigma, _ = _sigmas(z, ROOT, KAPPA)
    tl.store(y + (sample * N + rows) * D + columns, (z * sigma).to(y.dtype.element_ty), mask)


@jit
def backward_tiles(  # type: ignore[no-untyped-def]
    dy, dy_b, dy_n, dy_d, x, x_b, x_n, x_d, bias, dx, partial, N, chunks, chunk_rows,
    D: tl.constexpr, ROOT: tl.constexpr, KAPPA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    end: tl.constexpr = column_blocks * COLUMNS
    columns = ((program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    chunk = program // column_blocks
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * chunk_rows
    last = tl.minimum(first + chunk_rows, N)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = mask_of(rows < last, columns, end, D)
        gradient = load_piece(rows_of((dy, dy_b, dy_n, dy_d), sample, rows), columns, mask).to(tl.float32)
        z = _biased(rows_of((x, x_b, x_n, x_d), sample, rows), bias, columns, mask, end, D)
        sigma, dsigma = _sigmas(z, ROOT, KAPPA)
        d = gradient * (sigma + z * dsigma * (2.0 * ROOT) * (1.0 + 3.0 * KAPPA * z * z))
        if dx is not None:
            tl.store(dx + (sample * N + rows) * D + columns, d.to(dx.dtype.element_ty), mask)
        if partial is not None:
            total += d
    if partial is not None:
        inside = mask_of(columns >= 0, columns, end, D)
        tl.store(partial + chunk.to(tl.int64) * D + columns, over_rows(total), inside)


# ---- How the work is divided -----------------------------------------------------------------------------------------

_PROGRAMS = 4096
_SHORTEST_CHUNK = 64
_SUM_COLUMNS = 32
_SUM_TILE = Tile(1, 4)


def tile(itemsize: int) -> Tile:
    """The tile by the bytes of an element of the narrowest tensor: each access moves 16 bytes, and no registers spill."""
    return Tile(32, 4) if itemsize == 2 else Tile(16, 4)


def joined(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    """(samples, rows of a sample, strides) of tensors (B, N, ...): one long sample if the samples of each tensor are adjacent."""
    batch, length = shape[:2]
    if batch == 1 or any(of_sample != length * of_row for of_sample, of_row, *_ in strides):
        return batch, length, strides
    return 1, batch * length, tuple((0, *rest) for _, *rest in strides)


def chunking(batch: int, length: int, width: int, rows: int) -> tuple[int, int]:
    """(chunks of a sample, rows of a chunk): about ``_PROGRAMS`` programs in all, but no chunk of only a few rows."""
    others = max(batch, 1) * ceil_div(width, COLUMNS)
    wanted = max(1, min(ceil_div(_PROGRAMS, others), ceil_div(length, _SHORTEST_CHUNK)))
    chunk_rows = ceil_div(max(ceil_div(length, wanted), 1), rows) * rows
    return ceil_div(length, chunk_rows), chunk_rows


def _constants(width: int, rows: int) -> dict[str, Any]:
    return {"D": int(width), "ROOT": ROOT, "KAPPA": KAPPA, "ROWS": rows, "COLUMNS": COLUMNS}


@remembered_by_shape
def _forward_plan(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Any:
    """Programs, tile, strides of x, (N, blocks), constants."""
    batch, length, (of_x,) = joined(shape, strides)
    width, chosen = shape[2], tile(itemsize)
    blocks = ceil_div(length, chosen.rows)
    programs = batch * blocks * ceil_div(width, COLUMNS)
    return programs, chosen, of_x, (length, blocks), _constants(width, chosen.rows)


@remembered_by_shape
def _backward_plan(shape: tuple[int, ...], of_dy: tuple[int, ...], of_x: tuple[int, ...], *dtypes: torch.dtype) -> Any:
    """Programs, tile, strides of dy and of x, shape of the partial sums, (N, chunks, rows of a chunk), constants."""
    batch, length, (of_dy, of_x) = joined(shape, of_dy, of_x)
    width, chosen = shape[2], tile(min(dtype.itemsize for dtype in dtypes))
    chunks, chunk_rows = chunking(batch, length, width, chosen.rows)
    programs = batch * chunks * ceil_div(width, COLUMNS)
    walk = (length, chunks, chunk_rows)
    return programs, chosen, of_dy, of_x, (batch * chunks, width), walk, _constants(width, chosen.rows)


@remembered_by_shape
def _sum_plan(width: int, chunks_at_once: int) -> tuple[int, dict[str, Any]]:
    """Programs and constants of ``add_samples``."""
    constants = {"D": int(width), "KINDS": 1, "SAMPLES": chunks_at_once, "COLUMNS": _SUM_COLUMNS}
    return ceil_div(width, _SUM_COLUMNS), constants


# ---- Launch ----------------------------------------------------------------------------------------------------------


@BIAS_GELU.implement("triton", refuse=_triton.refuse)
def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    y = contiguous(x)
    programs, chosen, of_x, walk, constants = _forward_plan(x.shape, x.stride(), x.element_size())
    args = (x, *of_x, packed(bias), y, *walk)
    _triton.launch(forward_tiles, programs, chosen, x.device, *args, **constants)
    return y


@BIAS_GELU.gradients.implement("triton", refuse=_triton.refuse)
def backward(dy: Tensor, x: Tensor, bias: Tensor | None, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    of_x, of_bias = wanted
    programs, chosen, dy_at, x_at, sums, walk, constants = _backward_plan(x.shape, dy.stride(), x.stride(), dy.dtype, x.dtype)
    device = x.device
    dx = contiguous(x, of_x) if of_x else None
    partial = torch.empty(*sums, dtype=torch.float32, device=device) if of_bias else None
    args = (dy, *dy_at, x, *x_at, packed(bias), dx, partial, *walk)
    _triton.launch(backward_tiles, programs, chosen, device, *args, **constants)
    return dx, None if partial is None else added(partial, sums, device, of_bias)


def added(
    partial: Tensor, shape: tuple[int, int], device: torch.device, dtype: torch.dtype | None,
    chunks_at_once: int = 32,
) -> Tensor:  # fmt: skip
    """``partial``, of ``shape`` (chunks, D) on ``device``, summed over its chunks in a fixed order: (D,) in ``dtype``."""
    chunks, width = shape
    total = torch.empty(width, dtype=dtype, device=device)
    programs, constants = _sum_plan(width, chunks_at_once)
    _triton.launch(add_samples, programs, _SUM_TILE, device, partial, chunks, total, None, None, **constants)
    return total
