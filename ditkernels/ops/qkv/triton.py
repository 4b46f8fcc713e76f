"""The Triton kernels of ``split_qkv``'s backward. Names and formulas are those at the top of __init__.py.

    stack_tiles    A program owns the same ``COLUMNS`` channels of dq, dk and dv in one chunk of the rows of one sample and walks
                   through it, ``ROWS`` rows at a time. It reads them and writes dpacked: 2 passes over (B, N, parts·D), with
                   D = heads·head_dim. It also sums what it reads in fp32, separately for each row of its tile until the end, and
                   writes partial sums (B·chunks, parts·D), fp32.

    add_samples    (in _rows.py) adds the partial sums: dbias.

dpacked holds the bits that were read, without conversion. The same inputs give the same bits: nothing is added atomically, no two
programs write one element, and the number of chunks depends on shapes, strides and dtypes alone.

The kernel reads each of dq, dk and dv in place at its own strides. Heads that are adjacent in memory are merged into one long head,
and adjacent samples into one long sample, so that short ones fill a tile. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._rows import mask_of, over_rows
from ditkernels.ops._triton import Tile, ceil_div, jit, remembered_by_shape, tl
from ditkernels.ops.gelu.triton import COLUMNS, added, chunking, joined
from ditkernels.ops.qkv import SPLIT_QKV_BACKWARD, parts_of

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def _offsets(source, columns, D: tl.constexpr, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of a row's columns from its start in dq, dk or dv."""
    if HEAD < D:
        return (columns // HEAD) * source[3] + (columns % HEAD) * source[4]
    else:
        return columns * source[4]


@jit
def _read(source, sample, rows, columns, mask, D: tl.constexpr, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    lines = source[0] + sample * source[1] + rows * source[2]
    return tl.load(lines + _offsets(source, columns, D, HEAD), mask, 0.0)


@jit
def stack_tiles(  # type: ignore[no-untyped-def]
    dq, dq_b, dq_n, dq_h, dq_c, dk, dk_b, dk_n, dk_h, dk_c, dv, dv_b, dv_n, dv_h, dv_c, dpacked, partial,
    N, chunks, chunk_rows,
    D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    end: tl.constexpr = column_blocks * COLUMNS
    begin_k: tl.constexpr = 0 if dq is None else D
    begin_v: tl.constexpr = begin_k + D
    width: tl.constexpr = begin_v + D
    columns = ((program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    chunk = program // column_blocks
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * chunk_rows
    last = tl.minimum(first + chunk_rows, N)
    total_q = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_k = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_v = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = mask_of(rows < last, columns, end, D)
        out = dpacked + (sample * N + rows) * width + columns
        k = _read((dk, dk_b, dk_n, dk_h, dk_c), sample, rows, columns, mask, D, HEAD)
        v = _read((dv, dv_b, dv_n, dv_h, dv_c), sample, rows, columns, mask, D, HEAD)
        if dq is not None:
            q = _read((dq, dq_b, dq_n, dq_h, dq_c), sample, rows, columns, mask, D, HEAD)
            tl.store(out, q, mask)
            total_q += q.to(tl.float32)
        tl.store(out + begin_k, k, mask)
        tl.store(out + begin_v, v, mask)
        total_k += k.to(tl.float32)
        total_v += v.to(tl.float32)
    inside = mask_of(columns >= 0, columns, end, D)
    sums = partial + chunk.to(tl.int64) * width + columns
    if dq is not None:
        tl.store(sums, over_rows(total_q), inside)
    tl.store(sums + begin_k, over_rows(total_k), inside)
    tl.store(sums + begin_v, over_rows(total_v), inside)


# ---- Launch ----------------------------------------------------------------------------------------------------------

_CHUNKS_AT_ONCE = 128


def tile(itemsize: int) -> Tile:
    """The tile by the bytes of an element: each access moves 16 bytes, and no registers spill."""
    return Tile(16, 4) if itemsize == 2 else Tile(8, 4)


def _head(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> int:
    """How many channels have one common stride: those of all heads if the heads are adjacent, else those of one head."""
    heads, head_dim = shape[2:]
    together = all(heads == 1 or of_head == head_dim * of_channel for *_, of_head, of_channel in strides)
    return heads * head_dim if together else head_dim


@remembered_by_shape
def _plan(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], itemsize: int) -> Any:
    """Programs, tile, strides of the parts, shape of the partial sums, (N, chunks, rows of a chunk), constants."""
    batch, length, joined_strides = joined(shape, *strides)
    width, chosen = shape[2] * shape[3], tile(itemsize)
    chunks, chunk_rows = chunking(batch, length, width, chosen.rows)
    programs = batch * chunks * ceil_div(width, COLUMNS)
    sums = (batch * chunks, len(strides) * width)
    constants = {"D": int(width), "HEAD": int(_head(shape, strides)), "ROWS": chosen.rows, "COLUMNS": COLUMNS}
    return programs, chosen, joined_strides, sums, (length, chunks, chunk_rows), constants


@SPLIT_QKV_BACKWARD.implement("triton", refuse=_triton.refuse)
def backward(dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    parts = parts_of(dq, dk, dv)
    programs, chosen, strides, sums, walk, constants = _plan(dk.shape, tuple([part.stride() for part in parts]), dk.element_size())
    (batch, length, heads, head_dim), device = dk.shape, dk.device
    dpacked = torch.empty(batch, length, len(parts), heads, head_dim, dtype=dk.dtype, device=device)
    partial = torch.empty(*sums, dtype=torch.float32, device=device)
    args: list[Any] = [None] * (5 * (3 - len(parts)))
    for part, of_part in zip(parts, strides):
        args += part, *of_part
    _triton.launch(stack_tiles, programs, chosen, device, *args, dpacked, partial, *walk, **constants)
    return dpacked, added(partial, sums, device, dtype, _CHUNKS_AT_ONCE)
