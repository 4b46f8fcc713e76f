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

    add_chunks     a program owns ``COLUMNS`` channels of one sample: adds the chunks in order, writes dshift, dscale,
                   dgate (B, D), and the sample's terms of dweight, dbias, dbranch_bias (B, terms, D), fp32.

    add_samples    a program owns ``COLUMNS`` channels: adds the samples' terms in order, writes dweight, dbias, dbranch_bias (D,).

Arithmetic is fp32 on values widened after the load. Nothing is added atomically, no two programs write one element, and the
number of chunks depends on shapes alone: same inputs, same bits.

A row is held in two power-of-two pieces, HEAD and TAIL channels wide (``_triton.pieces``), so that the paper's widths leave no lane
idle; other widths mask the tail. (B, N, D) tensors are read in place at any strides; (B, D) vectors at any batch stride (one with
strided channels is copied). Offsets are 64-bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops import _triton, adaln
from ditkernels.ops._triton import Tile, batch_stride, ceil_div, jit, packed, pieces, strides, tl

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
def _mask(live, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mask of a piece that ends before channel END; its columns are tested only where the piece sticks out of the row."""
    mask = live
    if END > D:
        mask = live & (columns < D)
    return mask


@jit
def _channels(vector, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector's channels in fp32, (1, piece)."""
    if END > D:
        return tl.load(vector + columns, columns < D, 0.0).to(tl.float32)
    else:
        return tl.load(vector + columns).to(tl.float32)


@jit
def _load(rows, stride, columns, mask):  # type: ignore[no-untyped-def]
    """One piece of some rows in fp32, zero outside."""
    return tl.load(rows + columns * stride, mask, 0.0).to(tl.float32)


@jit
def _new_stream(  # type: ignore[no-untyped-def]
    x, x_d, branch, branch_d, gate, branch_bias, x1, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    """One piece of x1 = x + gate·(branch + branch_bias), in fp32 as rounded to the stored dtype; stores it unless x1 is None."""
    value = _load(x, x_d, columns, mask)
    if branch is not None:
        u = _load(branch, branch_d, columns, mask)
        if branch_bias is not None:
            u += _channels(branch_bias, columns, END, D)
        if gate is not None:
            u *= _channels(gate, columns, END, D)
        value += u
    if x1 is not None:
        stored = value.to(x1.dtype.element_ty)
        tl.store(x1 + columns, stored, mask)
        value = stored.to(tl.float32)
    return value


@jit
def _centred(value, mean, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """value - mean, zero outside the row so that squares can be summed."""
    centred = value - mean
    if END > D:
        centred = tl.where(columns < D, centred, 0.0)
    return centred


@jit
def _store_modulated(  # type: ignore[no-untyped-def]
    normed, shift, scale, weight, bias, h, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    """Stores one piece of h = (x̂·weight + bias)·(1 + scale) + shift."""
    if weight is not None:
        normed *= _channels(weight, columns, END, D)
    if bias is not None:
        normed += _channels(bias, columns, END, D)
    if scale is not None:
        normed *= 1.0 + _channels(scale, columns, END, D)
    if shift is not None:
        normed += _channels(shift, columns, END, D)
    tl.store(h + columns, normed.to(h.dtype.element_ty), mask)


@jit
def forward_rows(  # type: ignore[no-untyped-def]
    x,
    x_b,
    x_n,
    x_d,
    branch,
    branch_b,
    branch_n,
    branch_d,
    gate,
    gate_b,
    shift,
    shift_b,
    scale,
    scale_b,
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
    head_mask = _mask(live, head, HEAD, D)

    x += sample * x_b + rows * x_n
    if branch is not None:
        branch += sample * branch_b + rows * branch_n
    if gate is not None:
        gate += sample * gate_b
    if x1 is not None:
        x1 += line * D
    value = _new_stream(x, x_d, branch, branch_d, gate, branch_bias, x1, head, head_mask, HEAD, D)
    if TAIL > 0:
        tail = _tail_columns(HEAD, TAIL, ROWS)
        tail_mask = _mask(live, tail, HEAD + TAIL, D)
        tail_value = _new_stream(
            x, x_d, branch, branch_d, gate, branch_bias, x1, tail, tail_mask, HEAD + TAIL, D
        )

    if h is not None:
        if mean is not None:
            mu = tl.sum(value, 1, keep_dims=True)
            if TAIL > 0:
                mu += tl.sum(tail_value, 1, keep_dims=True)
            mu = tl.div_rn(mu, D * 1.0)
            tl.store(mean + line, mu, live)
            value = _centred(value, mu, head, HEAD, D)
            if TAIL > 0:
                tail_value = _centred(tail_value, mu, tail, HEAD + TAIL, D)
        squares = tl.sum(value * value, 1, keep_dims=True)
        if TAIL > 0:
            squares += tl.sum(tail_value * tail_value, 1, keep_dims=True)
        r = tl.rsqrt(tl.div_rn(squares, D * 1.0) + eps)
        tl.store(rstd + line, r, live)

        h += line * D
        if shift is not None:
            shift += sample * shift_b
        if scale is not None:
            scale += sample * scale_b
        _store_modulated(value * r, shift, scale, weight, bias, h, head, head_mask, HEAD, D)
        if TAIL > 0:
            _store_modulated(tail_value * r, shift, scale, weight, bias, h, tail, tail_mask, HEAD + TAIL, D)


@jit
def _slope(scale, weight, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """a = (1 + scale)·weight, (1, piece)."""
    slope = tl.full(columns.shape, 1.0, tl.float32)
    if scale is not None:
        slope += _channels(scale, columns, END, D)
    if weight is not None:
        slope *= _channels(weight, columns, END, D)
    return slope


@jit
def _normed(x1, x1_d, mu, r, columns, mask):  # type: ignore[no-untyped-def]
    """One piece of x̂ = (x1 - mean)·rstd; outside the row it is not zero, but there dh is."""
    value = _load(x1, x1_d, columns, mask)
    if mu is not None:
        value -= mu
    return value * r


@jit
def _through_norm(dnormed, normed, r, along_mean, along_normed):  # type: ignore[no-untyped-def]
    """One piece of rstd·(dx̂ - mean_d(dx̂) - x̂·mean_d(dx̂·x̂)); along_mean is None for rmsnorm."""
    dx = dnormed - normed * along_normed
    if along_mean is not None:
        dx -= along_mean
    return dx * r


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
def _over_rows(piece):  # type: ignore[no-untyped-def]
    return tl.sum(piece, 0, keep_dims=True)


@jit
def _folded(piece, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is added to a sum over the tail: one row where folding is cheap, else row by row, to be folded at the end."""
    if FOLD:
        return _over_rows(piece)
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
    dx1_b,
    dx1_n,
    dx1_d,
    dh,
    dh_b,
    dh_n,
    dh_d,
    x1,
    x1_b,
    x1_n,
    x1_d,
    branch,
    branch_b,
    branch_n,
    branch_d,
    gate,
    gate_b,
    scale,
    scale_b,
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
    if dx1 is not None:
        dx1 += sample * dx1_b
    if dh is not None:
        dh += sample * dh_b
        x1 += sample * x1_b
        if scale is not None:
            scale += sample * scale_b
        if not ONE_WARP:
            slope = _slope(scale, weight, head, HEAD, D)
            if TAIL > 0:
                tail_slope = _slope(scale, weight, tail, HEAD + TAIL, D)
    if dbranch is not None:
        branch += sample * branch_b
        gate += sample * gate_b
        if not ONE_WARP:
            g = _channels(gate, head, HEAD, D)
            if TAIL > 0:
                tail_g = _channels(gate, tail, HEAD + TAIL, D)

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
        mask = _mask(live, head, HEAD, D)
        if TAIL > 0:
            tail_mask = _mask(live, tail, HEAD + TAIL, D)

        # Between warps a reduction is a barrier that no load is moved across, so the loads that are needed last are issued
        # before it, and stay in their own dtype, which takes fewer registers. One warp has no barrier, and no registers
        # to spare: it loads what it needs when it needs it, vectors too.
        if not ONE_WARP:
            if dx1 is not None:
                stream = tl.load(dx1 + rows * dx1_n + head * dx1_d, mask, 0.0)
                if TAIL > 0:
                    tail_stream = tl.load(dx1 + rows * dx1_n + tail * dx1_d, tail_mask, 0.0)
            if dbranch is not None:
                u = tl.load(branch + rows * branch_n + head * branch_d, mask, 0.0)
                if TAIL > 0:
                    tail_u = tl.load(branch + rows * branch_n + tail * branch_d, tail_mask, 0.0)

        if dh is not None:
            if ROWS == 1:
                mu = tl.load(mean + sample * N + start) if mean is not None else None
                scaling = tl.load(rstd + sample * N + start)
            else:
                mu = tl.load(mean + line, live, 0.0) if mean is not None else None
                scaling = tl.load(rstd + line, live, 0.0)
            dnormed = _load(dh + rows * dh_n, dh_d, head, mask)
            normed = _normed(x1 + rows * x1_n, x1_d, mu, scaling, head, mask)
            if TAIL > 0:
                tail_dnormed = _load(dh + rows * dh_n, dh_d, tail, tail_mask)
                tail_normed = _normed(x1 + rows * x1_n, x1_d, mu, scaling, tail, tail_mask)
            if SUM_P >= 0:
                p += _over_rows(dnormed)
                if TAIL > 0:
                    tail_p += _folded(tail_dnormed, ONE_WARP)
            if SUM_Q >= 0:
                q += _over_rows(dnormed * normed)
                if TAIL > 0:
                    tail_q += _folded(tail_dnormed * tail_normed, ONE_WARP)

            if ONE_WARP:
                slope = _slope(scale, weight, head, HEAD, D)
                if TAIL > 0:
                    tail_slope = _slope(scale, weight, tail, HEAD + TAIL, D)
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
            d = _through_norm(dnormed, normed, scaling, along_mean, along_normed)
            if TAIL > 0:
                tail_d = _through_norm(tail_dnormed, tail_normed, scaling, along_mean, along_normed)
            if dx1 is not None:
                if ONE_WARP:
                    stream = tl.load(dx1 + rows * dx1_n + head * dx1_d, mask, 0.0)
                    if TAIL > 0:
                        tail_stream = tl.load(dx1 + rows * dx1_n + tail * dx1_d, tail_mask, 0.0)
                d += stream.to(tl.float32)
                if TAIL > 0:
                    tail_d += tail_stream.to(tl.float32)
        else:
            if ONE_WARP:
                stream = tl.load(dx1 + rows * dx1_n + head * dx1_d, mask, 0.0)
                if TAIL > 0:
                    tail_stream = tl.load(dx1 + rows * dx1_n + tail * dx1_d, tail_mask, 0.0)
            d = stream.to(tl.float32)
            if TAIL > 0:
                tail_d = tail_stream.to(tl.float32)

        if dx is not None:
            tl.store(dx + line * D + head, d.to(dx.dtype.element_ty), mask)
            if TAIL > 0:
                tl.store(dx + line * D + tail, tail_d.to(dx.dtype.element_ty), tail_mask)
        if dbranch is not None:
            if ONE_WARP:
                g = _channels(gate, head, HEAD, D)
                if TAIL > 0:
                    tail_g = _channels(gate, tail, HEAD + TAIL, D)
                u = tl.load(branch + rows * branch_n + head * branch_d, mask, 0.0)
                if TAIL > 0:
                    tail_u = tl.load(branch + rows * branch_n + tail * branch_d, tail_mask, 0.0)
            tl.store(dbranch + line * D + head, (g * d).to(dbranch.dtype.element_ty), mask)
            r += _over_rows(d * u.to(tl.float32))
            if TAIL > 0:
                tl.store(dbranch + line * D + tail, (tail_g * tail_d).to(dbranch.dtype.element_ty), tail_mask)
                tail_r += _folded(tail_d * tail_u.to(tl.float32), ONE_WARP)
        if SUM_S >= 0:
            s += _over_rows(d)
            if TAIL > 0:
                tail_s += _folded(tail_d, ONE_WARP)

    if partial is not None:
        tail = HEAD + tl.arange(0, TAIL).to(tl.int64)[None, :] if TAIL > 0 else None
        sums: tl.constexpr = (SUM_P >= 0) + (SUM_Q >= 0) + (SUM_R >= 0) + (SUM_S >= 0)
        partial += program.to(tl.int64) * (sums * D)
        if SUM_P >= 0:
            _store_sum(partial, SUM_P, p, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_P, _over_rows(tail_p), tail, HEAD + TAIL, D)
        if SUM_Q >= 0:
            _store_sum(partial, SUM_Q, q, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_Q, _over_rows(tail_q), tail, HEAD + TAIL, D)
        if SUM_R >= 0:
            _store_sum(partial, SUM_R, r, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_R, _over_rows(tail_r), tail, HEAD + TAIL, D)
        if SUM_S >= 0:
            _store_sum(partial, SUM_S, s, head, HEAD, D)
            if TAIL > 0:
                _store_sum(partial, SUM_S, _over_rows(tail_s), tail, HEAD + TAIL, D)


@jit
def add_chunks(  # type: ignore[no-untyped-def]
    partial,
    chunks,
    gate,
    gate_b,
    scale,
    scale_b,
    branch_bias,
    weight,
    bias,
    dgate,
    dshift,
    dscale,
    terms,
    D: tl.constexpr,
    SUM_P: tl.constexpr,
    SUM_Q: tl.constexpr,
    SUM_R: tl.constexpr,
    SUM_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    sample = (program // blocks).to(tl.int64)
    columns = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    sums: tl.constexpr = (SUM_P >= 0) + (SUM_Q >= 0) + (SUM_R >= 0) + (SUM_S >= 0)

    p = tl.zeros([COLUMNS], tl.float32)
    q = tl.zeros([COLUMNS], tl.float32)
    r = tl.zeros([COLUMNS], tl.float32)
    s = tl.zeros([COLUMNS], tl.float32)
    for chunk in range(chunks):
        at = partial + (sample * chunks + chunk) * (sums * D) + columns
        if SUM_P >= 0:
            p += tl.load(at + SUM_P * D, inside, 0.0)
        if SUM_Q >= 0:
            q += tl.load(at + SUM_Q * D, inside, 0.0)
        if SUM_R >= 0:
            r += tl.load(at + SUM_R * D, inside, 0.0)
        if SUM_S >= 0:
            s += tl.load(at + SUM_S * D, inside, 0.0)

    out = sample * D + columns
    if dshift is not None:
        tl.store(dshift + out, p.to(dshift.dtype.element_ty), inside)
    if dscale is not None:
        through_weight = q
        if weight is not None:
            through_weight *= tl.load(weight + columns, inside, 0.0).to(tl.float32)
        if bias is not None:
            through_weight += tl.load(bias + columns, inside, 0.0).to(tl.float32) * p
        tl.store(dscale + out, through_weight.to(dscale.dtype.element_ty), inside)
    if dgate is not None:
        through_gate = r
        if branch_bias is not None:
            through_gate += tl.load(branch_bias + columns, inside, 0.0).to(tl.float32) * s
        tl.store(dgate + out, through_gate.to(dgate.dtype.element_ty), inside)

    if terms is not None:
        kinds: tl.constexpr = (weight is not None) + (bias is not None) + (branch_bias is not None)
        terms += sample * (kinds * D) + columns
        if scale is not None:
            slope = 1.0 + tl.load(scale + sample * scale_b + columns, inside, 0.0).to(tl.float32)
            p *= slope
            q *= slope
        if gate is not None:
            s *= tl.load(gate + sample * gate_b + columns, inside, 0.0).to(tl.float32)
        if weight is not None:
            tl.store(terms, q, inside)
            terms += D
        if bias is not None:
            tl.store(terms, p, inside)
            terms += D
        if branch_bias is not None:
            tl.store(terms, s, inside)


@jit
def add_samples(  # type: ignore[no-untyped-def]
    terms,
    batch,
    out_0,
    out_1,
    out_2,
    D: tl.constexpr,
    KINDS: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < D
    for kind in tl.static_range(KINDS):
        total = tl.zeros([SAMPLES, COLUMNS], tl.float32)
        for start in range(0, batch, SAMPLES):
            samples = (start + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
            at = terms + (samples * KINDS + kind) * D + columns
            total += tl.load(at, (samples < batch) & inside, 0.0)
        out = out_0
        if kind == 1:
            out = out_1
        if kind == 2:
            out = out_2
        tl.store(out + columns, tl.sum(total, 0, keep_dims=True).to(out.dtype.element_ty), inside)


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
    (384, 2): Tile(2, 1),
    (384, 4): Tile(1, 1),
    (768, 2): Tile(1, 1),
    (768, 4): Tile(1, 2),
    (1024, 2): Tile(2, 4),
    (1024, 4): Tile(2, 4),
    (1152, 2): Tile(1, 4),
    (1152, 4): Tile(1, 4),
}

_PROGRAMS = 1024
_SHORTEST_CHUNK = 16
_COLUMNS = 128
_SAMPLES, _SAMPLE_COLUMNS = 32, 32


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


def chunking(batch: int, length: int, rows: int) -> tuple[int, int]:
    """(chunks of a sample, rows of a chunk) of the backward, from shapes alone.

    About ``_PROGRAMS`` programs in all, so that a GPU is filled, but no chunk so short that its partial sums would outweigh it.
    """
    wanted = max(1, min(ceil_div(_PROGRAMS, max(batch, 1)), ceil_div(length, _SHORTEST_CHUNK)))
    chunk_rows = ceil_div(max(ceil_div(length, wanted), 1), rows) * rows
    return ceil_div(length, chunk_rows), chunk_rows


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
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
    gate, shift, scale, branch_bias, weight, bias = map(
        packed, (gate, shift, scale, branch_bias, weight, bias)
    )
    _triton.launch(
        forward_rows,
        batch * blocks,
        tile,
        x.device,
        *(x, *strides(x), branch, *strides(branch)),
        *(gate, batch_stride(gate), shift, batch_stride(shift), scale, batch_stride(scale)),
        *(branch_bias, weight, bias, x1, h, mean, rstd, length, blocks, eps),
        D=width,
        HEAD=head,
        TAIL=tail,
        ROWS=tile.rows,
    )


def _statistics(x: Tensor, norm: str) -> tuple[Tensor | None, Tensor]:
    mean = None if norm == "rmsnorm" else x.new_empty(x.shape[:2], dtype=torch.float32)
    return mean, x.new_empty(x.shape[:2], dtype=torch.float32)


def _or_nothing(mean: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if mean is None else mean


def _contiguous(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


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
    h = _contiguous(x, out_dtype)
    mean, rstd = _statistics(x, norm)
    _forward(x, None, None, shift, scale, None, weight, bias, None, h, mean, rstd, eps)
    return h, _or_nothing(mean, x), rstd


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    x1 = _contiguous(x)
    _forward(x, branch, gate, None, None, branch_bias, None, None, x1, None, None, None, 0.0)
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
    x1, h = _contiguous(x), _contiguous(x, out_dtype)
    mean, rstd = _statistics(x, norm)
    _forward(x, branch, gate, shift, scale, branch_bias, weight, bias, x1, h, mean, rstd, eps)
    return x1, h, _or_nothing(mean, x), rstd


def _sum_indices(*needed: bool) -> tuple[dict[str, int], int]:
    """Where each of the sums P, Q, R, S lies among those that are needed (-1: it is not), and how many are."""
    places, count = {}, 0
    for name, need in zip(("SUM_P", "SUM_Q", "SUM_R", "SUM_S"), needed):
        places[name] = count if need else -1
        count += need
    return places, count


def _backward(
    dx1: Tensor | None,
    dh: Tensor | None,
    x1: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
) -> tuple[Tensor, ...]:
    """Runs the three kernels; returns dgate, dshift, dscale, dbranch_bias, dweight, dbias, (0,) for an absent argument."""
    like = next(t for t in (dh, dx1) if t is not None)
    batch, length, width = like.shape
    gate, shift, scale, branch_bias, weight, bias = map(
        packed, (gate, shift, scale, branch_bias, weight, bias)
    )
    places, count = _sum_indices(
        shift is not None or bias is not None,
        scale is not None or weight is not None,
        gate is not None,
        branch_bias is not None,
    )
    tile = backward_tile(width, _narrowest(dx1, dh, x1, branch))
    head, tail = pieces(width)
    chunks, chunk_rows = chunking(batch, length, tile.rows)
    partial = like.new_empty((batch, chunks, count, width), dtype=torch.float32) if count else None
    _triton.launch(
        backward_rows,
        batch * chunks,
        tile,
        like.device,
        *(dx1, *strides(dx1), dh, *strides(dh), x1, *strides(x1)),
        *(branch, *strides(branch), gate, batch_stride(gate), scale, batch_stride(scale), weight),
        *(mean, rstd, dx, dbranch, partial, length, chunks, chunk_rows),
        **places,
        D=width,
        HEAD=head,
        TAIL=tail,
        ROWS=tile.rows,
        ONE_WARP=tile.warps == 1,
    )
    dgate, dshift, dscale = (None if v is None else _contiguous(v) for v in (gate, shift, scale))
    vectors = [v for v in (weight, bias, branch_bias) if v is not None]
    terms = like.new_empty((batch, len(vectors), width), dtype=torch.float32) if vectors else None
    if partial is not None:
        _triton.launch(
            add_chunks,
            batch * ceil_div(width, _COLUMNS),
            Tile(1, 4),
            like.device,
            *(partial, chunks, gate, batch_stride(gate), scale, batch_stride(scale), branch_bias),
            *(weight, bias, dgate, dshift, dscale, terms),
            **places,
            D=width,
            COLUMNS=_COLUMNS,
        )
    dvectors = _add_samples(terms, vectors)
    dweight, dbias, dbranch_bias = (
        None if v is None else next(dvectors) for v in (weight, bias, branch_bias)
    )
    gradients = (dgate, dshift, dscale, dbranch_bias, dweight, dbias)
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _add_samples(terms: Tensor | None, vectors: list[Tensor]) -> Iterator[Tensor]:
    """The gradients of the (D,) vectors, from every sample's terms (B, vectors, D)."""
    if terms is None:
        return iter(())
    batch, kinds, width = terms.shape
    outs = [_contiguous(v) for v in vectors]
    _triton.launch(
        add_samples,
        ceil_div(width, _SAMPLE_COLUMNS),
        Tile(1, 4),
        terms.device,
        *(terms, batch, *outs, *[None] * (3 - kinds)),
        D=width,
        KINDS=kinds,
        SAMPLES=_SAMPLES,
        COLUMNS=_SAMPLE_COLUMNS,
    )
    return iter(outs)


def _saved(mean: Tensor, rstd: Tensor, norm: str) -> tuple[Tensor | None, Tensor]:
    return None if norm == "rmsnorm" else mean.contiguous(), rstd.contiguous()


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
    dx = _contiguous(x)
    statistics = _saved(mean, rstd, norm)
    _, dshift, dscale, _, dweight, dbias = _backward(
        None, dy, x, None, None, shift, scale, None, weight, bias, *statistics, dx, None
    )
    return dx, dshift, dscale, dweight, dbias


def _gated_residual_backward(
    dy: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None
) -> tuple[Tensor, ...]:
    dbranch = None if gate is None else _contiguous(branch)
    kept = None if gate is None else branch
    dgate, _, _, dbranch_bias, _, _ = _backward(
        dy, None, None, kept, gate, None, None, branch_bias, None, None, None, None, None, dbranch
    )
    return branch.new_empty(0) if dbranch is None else dbranch, dgate, dbranch_bias


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
    dx = _contiguous(x1)
    dbranch = None if gate is None else _contiguous(branch)
    kept = None if gate is None else branch
    statistics = _saved(mean, rstd, norm)
    vectors = _backward(
        *(dx1, dh, x1, kept, gate, shift, scale, branch_bias, weight, bias, *statistics, dx, dbranch)
    )
    return dx, branch.new_empty(0) if dbranch is None else dbranch, *vectors


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
