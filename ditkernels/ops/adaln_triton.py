"""The Triton kernels of ``adaln``. Names and formulas are those at the top of adaln.py.

One family of four kernels serves the three ops and their backwards; an absent argument (gate, shift, dx1 ...) is None and its
code is not compiled. Passes count how often each element of a (B, N, D) tensor is read or written.

    forward_rows   a program owns ``ROWS`` rows of one sample.
                   modulate_norm        reads x              writes h           2 passes
                   gated_residual       reads x, branch      writes x1          3 passes
                   gated_residual_norm  reads x, branch      writes x1, h       4 passes
                   and writes mean and rstd of each row (B, N), fp32. The statistics are those of x1 as stored.

    backward_rows  a program owns one chunk of the tokens of one sample and walks through it, ``ROWS`` rows at a time.
                   modulate_norm        reads dh, x                 writes dx            3 passes
                   gated_residual       reads dy, branch            writes dbranch       3 passes
                   gated_residual_norm  reads dx1, dh, x1, branch   writes dx, dbranch   6 passes
                   and adds up P = Σ dh, Q = Σ dh·x̂, R = Σ dx·branch, S = Σ dx in fp32; those that are needed go to
                   partial sums (B, chunks, sums, D), fp32. Without a gate the branch is not read and dbranch not written.

    add_chunks, add_samples    of _rows_triton.py bring the partial sums together: the gradients of all vectors.

Arithmetic is fp32 on values widened after the load. Nothing is added atomically, no two programs write one element, and the
number of chunks depends on shapes alone: same inputs, same bits.

A row is held in two power-of-two pieces, HEAD and TAIL channels wide (``_triton.pieces``), so that the paper's widths leave no lane
idle; other widths mask the tail. (B, N, D) tensors are read in place at any strides; (B, D) vectors at any batch stride (one with
strided channels is copied). Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops import _triton, adaln
from ditkernels.ops._rows_triton import (
    Vectors,
    centred,
    channels_of,
    chunking,
    contiguous,
    load_piece,
    mask_of,
    modulated,
    of_sample,
    or_empty,
    over_rows,
    rows_of,
    saved_statistics,
    slope_of,
    statistics,
    stream_piece,
    through_norm,
)
from ditkernels.ops._triton import Tile, ceil_div, jit, per_sample, pieces, tl, with_strides

# ------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------


@jit
def _tail_columns(HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tail's channels, (ROWS, TAIL): spread over the rows, so that vectors are loaded in the layout of the rows.

    A narrow piece of one row would be laid out differently, and every use of the vector would pass through shared memory.
    """
    return HEAD + tl.arange(0, TAIL).to(tl.int64)[None, :] + tl.zeros([ROWS, 1], tl.int64)


@jit
def _store_stream(x1, line, value, columns, mask, D: tl.constexpr):  # type: ignore[no-untyped-def]
    if x1 is not None:
        tl.store(x1 + line * D + columns, value.to(x1.dtype.element_ty), mask)


@jit
def _store_modulated(  # type: ignore[no-untyped-def]
    normed, shift, scale, weight, bias, h, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    value = modulated(normed, shift, scale, weight, bias, columns, END, D)
    tl.store(h + columns, value.to(h.dtype.element_ty), mask)


@jit
def forward_rows(  # type: ignore[no-untyped-def]
    x,
    branch,
    gate,
    shift,
    scale,
    branch_bias,
    weight,
    bias,
    x1,
    h,
    mean,
    rstd,
    N,
    blocks,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    rows = ((program % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    live = rows < N
    line = sample * N + rows
    head = tl.arange(0, HEAD).to(tl.int64)[None, :]
    head_mask = mask_of(live, head, HEAD, D)
    gate = of_sample(gate, sample) if gate is not None else None
    shift = of_sample(shift, sample) if shift is not None else None
    scale = of_sample(scale, sample) if scale is not None else None
    x = rows_of(x, sample, rows)
    branch = rows_of(branch, sample, rows) if branch is not None else None

    u = load_piece(branch, head, head_mask) if branch is not None else None
    value = stream_piece(x, u, gate, branch_bias, head, head_mask, HEAD, D)
    _store_stream(x1, line, value, head, head_mask, D)
    if TAIL > 0:
        tail = _tail_columns(HEAD, TAIL, ROWS)
        tail_mask = mask_of(live, tail, HEAD + TAIL, D)
        tail_u = load_piece(branch, tail, tail_mask) if branch is not None else None
        tail_value = stream_piece(x, tail_u, gate, branch_bias, tail, tail_mask, HEAD + TAIL, D)
        _store_stream(x1, line, tail_value, tail, tail_mask, D)

    if h is not None:
        if mean is not None:
            mu = tl.sum(value, 1, keep_dims=True)
            if TAIL > 0:
                mu += tl.sum(tail_value, 1, keep_dims=True)
            mu = tl.div_rn(mu, D * 1.0)
            tl.store(mean + line, mu, live)
            value = centred(value, mu, head, HEAD, D)
            if TAIL > 0:
                tail_value = centred(tail_value, mu, tail, HEAD + TAIL, D)
        squares = tl.sum(value * value, 1, keep_dims=True)
        if TAIL > 0:
            squares += tl.sum(tail_value * tail_value, 1, keep_dims=True)
        r = tl.rsqrt(tl.div_rn(squares, D * 1.0) + eps)
        tl.store(rstd + line, r, live)

        h += line * D
        _store_modulated(value * r, shift, scale, weight, bias, h, head, head_mask, HEAD, D)
        if TAIL > 0:
            _store_modulated(tail_value * r, shift, scale, weight, bias, h, tail, tail_mask, HEAD + TAIL, D)


@jit
def _normed(x1, mu, r, columns, mask):  # type: ignore[no-untyped-def]
    """One piece of x̂ = (x1 - mean)·rstd; outside the row it is not zero, but there dh is."""
    value = load_piece(x1, columns, mask).to(tl.float32)
    if mu is not None:
        value -= mu
    return value * r


@jit
def _along(piece, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of each row of a piece.

    Of a single row it is a scalar: as a tensor it would have the layout of its piece, and to add those of head and tail
    the compiler would move a whole piece through shared memory.
    """
    if ROWS == 1:
        return tl.sum(tl.sum(piece, 1), 0)
    else:
        return tl.sum(piece, 1, keep_dims=True)


@jit
def _folded(piece, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is added to a sum over the tail: one row where folding is cheap, else row by row, to be folded at the end."""
    if FOLD:
        return over_rows(piece)
    else:
        return piece


@jit
def _store_sum(partial, at: tl.constexpr, total, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    if END > D:
        tl.store(partial + at * D + columns, total, columns < D)
    else:
        tl.store(partial + at * D + columns, total)


@jit
def backward_rows(  # type: ignore[no-untyped-def]
    dx1,
    dh,
    x1,
    branch,
    gate,
    scale,
    weight,
    mean,
    rstd,
    dx,
    dbranch,
    partial,
    N,
    chunks,
    chunk_rows,
    D: tl.constexpr,
    SUM_P: tl.constexpr,
    SUM_Q: tl.constexpr,
    SUM_R: tl.constexpr,
    SUM_S: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_WARP: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    first = (program % chunks) * chunk_rows
    head = tl.arange(0, HEAD).to(tl.int64)[None, :]
    if TAIL > 0:
        tail = _tail_columns(HEAD, TAIL, ROWS)
    gate = of_sample(gate, sample) if gate is not None else None
    scale = of_sample(scale, sample) if scale is not None else None
    if dh is not None and not ONE_WARP:
        slope = slope_of(scale, weight, head, HEAD, D)
        if TAIL > 0:
            tail_slope = slope_of(scale, weight, tail, HEAD + TAIL, D)
    if dbranch is not None and not ONE_WARP:
        g = channels_of(gate, head, HEAD, D)
        if TAIL > 0:
            tail_g = channels_of(gate, tail, HEAD + TAIL, D)

    p = tl.zeros([1, HEAD], tl.float32)
    q = tl.zeros([1, HEAD], tl.float32)
    r = tl.zeros([1, HEAD], tl.float32)
    s = tl.zeros([1, HEAD], tl.float32)
    if TAIL > 0:
        tail_p = tl.zeros([1 if ONE_WARP else ROWS, TAIL], tl.float32)
        tail_q = tl.zeros([1 if ONE_WARP else ROWS, TAIL], tl.float32)
        tail_r = tl.zeros([1 if ONE_WARP else ROWS, TAIL], tl.float32)
        tail_s = tl.zeros([1 if ONE_WARP else ROWS, TAIL], tl.float32)

    last = tl.minimum(first + chunk_rows, N)
    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = rows < last
        line = sample * N + rows
        mask = mask_of(live, head, HEAD, D)
        stream_rows = rows_of(dx1, sample, rows) if dx1 is not None else None
        branch_rows = rows_of(branch, sample, rows) if dbranch is not None else None
        if TAIL > 0:
            tail_mask = mask_of(live, tail, HEAD + TAIL, D)

        # Between warps a reduction is a barrier that no load is moved across, so the loads that are needed last are issued
        # before it, and stay in their own dtype, which takes fewer registers. One warp has no barrier, and no registers
        # to spare: it loads what it needs when it needs it, vectors too.
        if not ONE_WARP:
            if dx1 is not None:
                stream = load_piece(stream_rows, head, mask)
                if TAIL > 0:
                    tail_stream = load_piece(stream_rows, tail, tail_mask)
            if dbranch is not None:
                u = load_piece(branch_rows, head, mask)
                if TAIL > 0:
                    tail_u = load_piece(branch_rows, tail, tail_mask)

        if dh is not None:
            if ROWS == 1:
                mu = tl.load(mean + sample * N + start) if mean is not None else None
                scaling = tl.load(rstd + sample * N + start)
            else:
                mu = tl.load(mean + line, live, 0.0) if mean is not None else None
                scaling = tl.load(rstd + line, live, 0.0)
            dh_rows = rows_of(dh, sample, rows)
            x1_rows = rows_of(x1, sample, rows)
            dnormed = load_piece(dh_rows, head, mask).to(tl.float32)
            normed = _normed(x1_rows, mu, scaling, head, mask)
            if TAIL > 0:
                tail_dnormed = load_piece(dh_rows, tail, tail_mask).to(tl.float32)
                tail_normed = _normed(x1_rows, mu, scaling, tail, tail_mask)
            if SUM_P >= 0:
                p += over_rows(dnormed)
                if TAIL > 0:
                    tail_p += _folded(tail_dnormed, ONE_WARP)
            if SUM_Q >= 0:
                q += over_rows(dnormed * normed)
                if TAIL > 0:
                    tail_q += _folded(tail_dnormed * tail_normed, ONE_WARP)

            if ONE_WARP:
                slope = slope_of(scale, weight, head, HEAD, D)
                if TAIL > 0:
                    tail_slope = slope_of(scale, weight, tail, HEAD + TAIL, D)
            dnormed *= slope
            along_normed = _along(dnormed * normed, ROWS)
            along_mean = _along(dnormed, ROWS) if mean is not None else None
            if TAIL > 0:
                tail_dnormed *= tail_slope
                along_normed += _along(tail_dnormed * tail_normed, ROWS)
                if mean is not None:
                    along_mean += _along(tail_dnormed, ROWS)
            along_normed = tl.div_rn(along_normed, D * 1.0)
            if mean is not None:
                along_mean = tl.div_rn(along_mean, D * 1.0)
            d = through_norm(dnormed, normed, scaling, along_mean, along_normed)
            if TAIL > 0:
                tail_d = through_norm(tail_dnormed, tail_normed, scaling, along_mean, along_normed)
            if dx1 is not None:
                if ONE_WARP:
                    stream = load_piece(stream_rows, head, mask)
                    if TAIL > 0:
                        tail_stream = load_piece(stream_rows, tail, tail_mask)
                d += stream.to(tl.float32)
                if TAIL > 0:
                    tail_d += tail_stream.to(tl.float32)
        else:
            if ONE_WARP:
                stream = load_piece(stream_rows, head, mask)
                if TAIL > 0:
                    tail_stream = load_piece(stream_rows, tail, tail_mask)
            d = stream.to(tl.float32)
            if TAIL > 0:
                tail_d = tail_stream.to(tl.float32)

        if dx is not None:
            tl.store(dx + line * D + head, d.to(dx.dtype.element_ty), mask)
            if TAIL > 0:
                tl.store(dx + line * D + tail, tail_d.to(dx.dtype.element_ty), tail_mask)
        if dbranch is not None:
            if ONE_WARP:
                g = channels_of(gate, head, HEAD, D)
                if TAIL > 0:
                    tail_g = channels_of(gate, tail, HEAD + TAIL, D)
                u = load_piece(branch_rows, head, mask)
                if TAIL > 0:
                    tail_u = load_piece(branch_rows, tail, tail_mask)
            tl.store(dbranch + line * D + head, (g * d).to(dbranch.dtype.element_ty), mask)
            r += over_rows(d * u.to(tl.float32))
            if TAIL > 0:
                tl.store(dbranch + line * D + tail, (tail_g * tail_d).to(dbranch.dtype.element_ty), tail_mask)
                tail_r += _folded(tail_d * tail_u.to(tl.float32), ONE_WARP)
        if SUM_S >= 0:
            s += over_rows(d)
            if TAIL > 0:
                tail_s += _folded(tail_d, ONE_WARP)

    if partial is not None:
        tail = HEAD + tl.arange(0, TAIL).to(tl.int64)[None, :] if TAIL > 0 else None
        sums: tl.constexpr = (SUM_P >= 0) + (SUM_Q >= 0) + (SUM_R >= 0) + (SUM_S >= 0)
        partial += program.to(tl.int64) * (sums * D)
        if SUM_P >= 0:
            _store_sum(partial, SUM_P, p, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_P, over_rows(tail_p), tail, HEAD + TAIL, D)
        if SUM_Q >= 0:
            _store_sum(partial, SUM_Q, q, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_Q, over_rows(tail_q), tail, HEAD + TAIL, D)
        if SUM_R >= 0:
            _store_sum(partial, SUM_R, r, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_R, over_rows(tail_r), tail, HEAD + TAIL, D)
        if SUM_S >= 0:
            _store_sum(partial, SUM_S, s, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_S, over_rows(tail_s), tail, HEAD + TAIL, D)


# ------------------------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------------------------

# By width, and by the bytes of an element of the narrowest (B, N, D) tensor: rows and warps such that 128-bit accesses move the
# head, and where it can be the tail, and that nothing spills.
_FORWARD = {
    (384, 2): Tile(2, 1),
    (384, 4): Tile(2, 1),
    (768, 2): Tile(2, 2),
    (768, 4): Tile(2, 2),
    (1024, 2): Tile(2, 4),
    (1024, 4): Tile(2, 4),
    (1152, 2): Tile(2, 4),
    (1152, 4): Tile(2, 4),
}
_BACKWARD = {
    (384, 2): Tile(2, 1, registers=255),
    (384, 4): Tile(1, 1),
    (768, 2): Tile(1, 1),
    (768, 4): Tile(1, 2),
    (1024, 2): Tile(2, 4),
    (1024, 4): Tile(2, 4),
    (1152, 2): Tile(1, 4),
    (1152, 4): Tile(1, 4),
}


def _other_width(width: int) -> Tile:
    """About 1024 channels at a time, in warps of 256; rows wider than that one by one."""
    head, _ = pieces(width)
    return Tile(max(1, min(8, 1024 // head)), max(4, min(32, head // 256)))


def _narrowest(*tensors: Tensor | None) -> int:
    return min(t.element_size() for t in tensors if t is not None)


def forward_tile(width: int, itemsize: int) -> Tile:
    return _FORWARD.get((width, itemsize)) or _other_width(width)


def backward_tile(width: int, itemsize: int) -> Tile:
    return _BACKWARD.get((width, itemsize)) or _other_width(width)


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    branch: Tensor | None,
    vectors: Vectors,
    x1: Tensor | None,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None:
    batch, length, width = x.shape
    tile = forward_tile(width, _narrowest(x, branch, h))
    head, tail = pieces(width)
    blocks = ceil_div(length, tile.rows)
    gate, shift, scale, branch_bias, weight, bias = vectors
    _triton.launch(
        forward_rows,
        batch * blocks,
        tile,
        x.device,
        *(with_strides(x), with_strides(branch), per_sample(gate), per_sample(shift), per_sample(scale)),
        *(branch_bias, weight, bias, x1, h, mean, rstd, length, blocks, eps),
        D=width,
        HEAD=head,
        TAIL=tail,
        ROWS=tile.rows,
    )


def _modulate_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    h = contiguous(x, out_dtype)
    mean, rstd = statistics(x, norm)
    _forward(x, None, Vectors.packed(None, shift, scale, None, weight, bias), None, h, mean, rstd, eps)
    return h, or_empty(mean, x, torch.float32), rstd


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    x1 = contiguous(x)
    vectors = Vectors.packed(gate, None, None, branch_bias, None, None)
    _forward(x, branch, vectors, x1, None, None, None, 0.0)
    return x1


def _gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, h = contiguous(x), contiguous(x, out_dtype)
    mean, rstd = statistics(x, norm)
    vectors = Vectors.packed(gate, shift, scale, branch_bias, weight, bias)
    _forward(x, branch, vectors, x1, h, mean, rstd, eps)
    return x1, h, or_empty(mean, x, torch.float32), rstd


def _backward(
    dx1: Tensor | None,
    dh: Tensor | None,
    x1: Tensor | None,
    branch: Tensor | None,
    vectors: Vectors,
    mean: Tensor | None,
    rstd: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
) -> tuple[Tensor, ...]:
    """Runs the three kernels; returns the gradients of the vectors in their order, (0,) for an absent one."""
    like = next(t for t in (dh, dx1) if t is not None)
    batch, length, width = like.shape
    tile = backward_tile(width, _narrowest(dx1, dh, x1, branch))
    head, tail = pieces(width)
    chunks, chunk_rows = chunking(batch, length, tile.rows)
    partial = vectors.partial_sums(like, chunks)
    _triton.launch(
        backward_rows,
        batch * chunks,
        tile,
        like.device,
        *map(with_strides, (dx1, dh, x1, branch)),
        *(per_sample(vectors.gate), per_sample(vectors.scale), vectors.weight),
        *(mean, rstd, dx, dbranch, partial, length, chunks, chunk_rows),
        **vectors.sums(),
        D=width,
        HEAD=head,
        TAIL=tail,
        ROWS=tile.rows,
        ONE_WARP=tile.warps == 1,
    )
    return tuple(or_empty(g, like) for g in vectors.gradients(partial))


def _modulate_norm_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    norm: str,
) -> tuple[Tensor, ...]:
    dx = contiguous(x)
    vectors = Vectors.packed(None, shift, scale, None, weight, bias)
    _, dshift, dscale, _, dweight, dbias = _backward(
        None, dy, x, None, vectors, *saved_statistics(mean, rstd, norm), dx, None
    )
    return dx, dshift, dscale, dweight, dbias


def _gated_residual_backward(
    dy: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None
) -> tuple[Tensor, ...]:
    dbranch = None if gate is None else contiguous(branch)
    kept = None if gate is None else branch
    vectors = Vectors.packed(gate, None, None, branch_bias, None, None)
    dgate, _, _, dbranch_bias, _, _ = _backward(dy, None, None, kept, vectors, None, None, None, dbranch)
    return or_empty(dbranch, branch), dgate, dbranch_bias


def _gated_residual_norm_backward(
    dx1: Tensor | None,
    dh: Tensor,
    x1: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    norm: str,
) -> tuple[Tensor, ...]:
    dx = contiguous(x1)
    dbranch = None if gate is None else contiguous(branch)
    kept = None if gate is None else branch
    vectors = Vectors.packed(gate, shift, scale, branch_bias, weight, bias)
    dvectors = _backward(dx1, dh, x1, kept, vectors, *saved_statistics(mean, rstd, norm), dx, dbranch)
    return dx, or_empty(dbranch, branch), *dvectors


# ------------------------------------------------------------------------------------------------------------------
# Registration
# ------------------------------------------------------------------------------------------------------------------


def _refuse(*args: Any) -> str | None:
    """Every op of this family has a (B, N, D) tensor among its arguments; all floating-point arguments must be of our dtypes."""
    given = [a for a in args if isinstance(a, (Tensor, torch.dtype))]
    tokens = next(a for a in given if isinstance(a, Tensor) and a.dim() == 3)
    return _triton.refuse(tokens.shape[-1], tokens, *given)


for _op, _kernel in (
    (adaln.MODULATE_NORM, _modulate_norm),
    (adaln.MODULATE_NORM_BACKWARD, _modulate_norm_backward),
    (adaln.GATED_RESIDUAL, _gated_residual),
    (adaln.GATED_RESIDUAL_BACKWARD, _gated_residual_backward),
    (adaln.GATED_RESIDUAL_NORM, _gated_residual_norm),
    (adaln.GATED_RESIDUAL_NORM_BACKWARD, _gated_residual_norm_backward),
):
    registry.implement(_op, "triton", _kernel, refuse=_refuse)
