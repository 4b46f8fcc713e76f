"""The Triton kernels of ``split_qkv``'s backward. Names and formulas are those at the top of qkv.py.

    stack_tiles    a program owns the same ``COLUMNS`` channels of dq, of dk and of dv, in one chunk of the rows of one sample, and
                   walks through it, ``ROWS`` rows at a time: reads them, writes dpacked. Two passes over (B, N, parts·D), with
                   D = heads·head_dim. It adds up what it reads in fp32, row by row of its tile, and writes the sums to partial
                   sums (B·chunks, parts·D), fp32.

    add_samples    of _rows_triton.py brings the partial sums together: dbias.

Bits are moved, not numbers: dpacked holds what was read. Nothing is added atomically, no two programs write one element, and the
number of chunks depends on shapes alone: same inputs, same bits.

Each of dq, dk and dv is read in place at its own strides. Heads that lie side by side are taken as one long head, and samples that
follow each other without a gap as one long sample, so that short ones fill a tile. Offsets are 64-bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops import _triton
from ditkernels.ops._rows_triton import add_samples, mask_of, over_rows
from ditkernels.ops._triton import Tile, ceil_div, jit, tl, with_strides
from ditkernels.ops.bias_gelu_triton import chunking
from ditkernels.ops.qkv import SPLIT_QKV_BACKWARD, parts_of

COLUMNS = 128

# ------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------


@jit
def _across(source, columns, D: tl.constexpr, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the columns of a row lie in dq, dk or dv."""
    if HEAD < D:
        return (columns // HEAD) * source[3] + (columns % HEAD) * source[4]
    else:
        return columns * source[4]


@jit
def _read(source, sample, rows, columns, mask, D: tl.constexpr, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    lines = source[0] + sample * source[1] + rows * source[2]
    return tl.load(lines + _across(source, columns, D, HEAD), mask, 0.0)


@jit
def stack_tiles(  # type: ignore[no-untyped-def]
    dq,
    dk,
    dv,
    dpacked,
    partial,
    N,
    chunks,
    chunk_rows,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    across: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    end: tl.constexpr = across * COLUMNS
    begin_k: tl.constexpr = 0 if dq is None else D
    begin_v: tl.constexpr = begin_k + D
    width: tl.constexpr = begin_v + D
    columns = ((program % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    chunk = program // across
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
        k = _read(dk, sample, rows, columns, mask, D, HEAD)
        v = _read(dv, sample, rows, columns, mask, D, HEAD)
        if dq is not None:
            q = _read(dq, sample, rows, columns, mask, D, HEAD)
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


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------

_SUM_CHUNKS, _SUM_COLUMNS = 128, 32


def tile(itemsize: int) -> Tile:
    """By the bytes of an element: every access 16 bytes, and registers to spare."""
    return Tile(16, 4) if itemsize == 2 else Tile(8, 4)


def _joined(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The parts with all their samples as one, where each sample of each begins where the one before ends; else as they are."""
    batch, length, heads, head_dim = parts[0].shape
    if batch == 1 or any(t.stride(0) != length * t.stride(1) for t in parts):
        return parts
    return tuple(t.as_strided((1, batch * length, heads, head_dim), (0, *t.stride()[1:])) for t in parts)


def _head(parts: tuple[Tensor, ...]) -> int:
    """Channels that lie in step: those of a head, or of all heads."""
    heads, head_dim = parts[0].shape[2:]
    together = all(heads == 1 or t.stride(2) == head_dim * t.stride(3) for t in parts)
    return heads * head_dim if together else head_dim


def _split_qkv_backward(
    dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    parts = parts_of(dq, dk, dv)
    dpacked = dk.new_empty((*dk.shape[:2], len(parts), *dk.shape[2:]))
    parts = _joined(parts)
    batch, length, heads, head_dim = parts[0].shape
    width, chosen = heads * head_dim, tile(dk.element_size())
    chunks, chunk_rows = chunking(batch, length, width, chosen.rows)
    partial = dk.new_empty((batch * chunks, len(parts) * width), dtype=torch.float32)
    arguments = [with_strides(part) for part in parts]
    _triton.launch(
        stack_tiles,
        batch * chunks * ceil_div(width, COLUMNS),
        chosen,
        dk.device,
        *([None] * (3 - len(parts)) + arguments),
        *(dpacked, partial, length, chunks, chunk_rows),
        D=width,
        HEAD=_head(parts),
        ROWS=chosen.rows,
        COLUMNS=COLUMNS,
    )
    return dpacked, _added(partial, dtype)


def _added(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the chunks (chunks, channels), in their order, in ``dtype``."""
    chunks, width = partial.shape
    dbias = partial.new_empty((width,), dtype=dtype)
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


def _refuse(dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> str | None:
    # No program holds a whole row, so that a row may be of any width.
    return _triton.refuse(1, dk, dtype)


registry.implement(SPLIT_QKV_BACKWARD, "triton", _split_qkv_backward, refuse=_refuse)
