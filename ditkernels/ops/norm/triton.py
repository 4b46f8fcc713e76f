"""The Triton kernels of the norm family. Names and formulas are those at the top of norm/__init__.py.

The three ops and their backwards share these kernels. An absent argument (gate, shift, dx1 ...) is None, and Triton does not
compile the code that uses it. A pass is one read or one write of a (B, N, D) tensor, counted where all gradients are wanted.

    forward_rows   A program owns ``ROWS`` rows of one sample.
                   modulate_norm        reads x              writes h           2 passes
                   gated_residual       reads x, branch      writes x1          3 passes
                   gated_residual_norm  reads x, branch      writes x1, h       4 passes
                   If ``keep`` is set, it also writes ``stats`` (B, N, S), fp32: mean and rstd (rmsnorm: rstd) of x1 as stored.

    backward_rows  A program owns one chunk of the tokens of one sample and walks through it, ``ROWS`` rows at a time.
                   modulate_norm        reads dh, x                 writes dx            3 passes
                   gated_residual       reads dx1, branch           writes dbranch       3 passes
                   gated_residual_norm  reads dx1, dh, x1, branch   writes dx, dbranch   6 passes
                   It also writes each chunk's P = Σ dh, Q = Σ dh·x̂, R = Σ dx·branch and S = Σ dx, as far as they are needed, to
                   partial sums (B, chunks, sums, D), fp32. It reads and writes only what the wanted gradients need.

    add_chunks     A program owns ``COLUMNS`` channels of one sample. It adds the chunks in order, and writes dshift, dscale and
                   dgate (B, D) and the sample's terms of dweight, dbias and dbranch_bias (B, terms, D), fp32.

    add_samples    (in _rows.py) adds these terms over the samples: dweight, dbias, dbranch_bias (D,).

Arithmetic is fp32 on values that are widened after the load. The same inputs give the same bits: nothing is added atomically, no
two programs write one element, and the number of chunks depends on shapes and dtypes alone.

Two power-of-two pieces, HEAD and TAIL channels wide (``_triton.pieces``), hold a row. They fill all lanes at the paper's widths;
other widths mask the tail. The kernels read (B, N, D) tensors in place at any strides and (B, D) vectors at any batch stride; a
vector with strided channels is copied first. Offsets are 64-bit.

The file is long because three ops and their backwards share its kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._rows import (
    add_samples,
    centred,
    channels_of,
    contiguous,
    load_piece,
    mask_of,
    modulated,
    of_sample,
    over_rows,
    rows_of,
    stream_piece,
)
from ditkernels.ops._triton import Tile, ceil_div, jit, packed, per_sample, pieces, remembered_by_shape, tl, with_strides
from ditkernels.ops.norm import GATED_RESIDUAL, GATED_RESIDUAL_NORM, MODULATE_NORM
from ditkernels.ops.spec import Wanted

# ---- Forward ---------------------------------------------------------------------------------------------------------


@jit
def _tail_columns(HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tail's channels, repeated for each row, (ROWS, TAIL), so that a vector is loaded in the layout of the rows.

    Triton gives a narrow (1, TAIL) vector another layout, and would convert it through shared memory at each use.
    """
    return HEAD + tl.arange(0, TAIL).to(tl.int64)[None, :] + tl.zeros([ROWS, 1], tl.int64)


@jit
def _store(tensor, at, value, mask):  # type: ignore[no-untyped-def]
    """Stores a piece in the tensor's dtype, unless the tensor is None."""
    if tensor is not None:
        tl.store(tensor + at, value.to(tensor.dtype.element_ty), mask)


@jit
def forward_rows(  # type: ignore[no-untyped-def]
    x, x_b, x_n, x_d, branch, branch_b, branch_n, branch_d, gate, gate_b, shift, shift_b, scale, scale_b,
    branch_bias, weight, bias, x1, h, stats, N, blocks, eps,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    rows = ((program % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    gate = of_sample((gate, gate_b), sample) if gate is not None else None
    shift = of_sample((shift, shift_b), sample) if shift is not None else None
    scale = of_sample((scale, scale_b), sample) if scale is not None else None
    tokens = (x, x_b, x_n, x_d), (branch, branch_b, branch_n, branch_d)
    norm_rows(
        tokens, gate, shift, scale, branch_bias, weight, bias, x1, h, stats, None, sample, rows, N, eps, D, S, HEAD, TAIL, ROWS
    )


@jit
def _squares(u):  # type: ignore[no-untyped-def]
    """The sum of the squares of each row of a piece, (ROWS, 1)."""
    value = u.to(tl.float32)
    return tl.sum(value * value, 1, keep_dims=True)


@jit
def _normed_branch(u, r, weight, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of the branch's norm in fp32. r: 1/rms of its rows."""
    normed = u.to(tl.float32) * r
    if weight is not None:
        normed *= channels_of(weight, columns, END, D)
    return normed


@jit
def norm_rows(  # type: ignore[no-untyped-def]
    tokens, gate, shift, scale, branch_bias, weight, bias, x1, h, stats, branch_norm, sample, rows, N, eps,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The forward of some rows of a sample. ``tokens``: x and the branch with their strides; a vector is a pointer to its row.

    ``branch_norm``: weight, statistics and eps of a norm of the branch, or None.
    """
    live = rows < N
    line = sample * N + rows
    head = tl.arange(0, HEAD).to(tl.int64)[None, :]
    head_mask = mask_of(live, head, HEAD, D)
    x = rows_of(tokens[0], sample, rows)
    branch = rows_of(tokens[1], sample, rows) if tokens[1][0] is not None else None

    u = load_piece(branch, head, head_mask) if branch is not None else None
    if branch_norm is not None:
        squares = _squares(u)
        if TAIL > 0:
            early = _tail_columns(HEAD, TAIL, ROWS)
            early_u = load_piece(branch, early, mask_of(live, early, HEAD + TAIL, D))
            squares += _squares(early_u)
        of_branch = tl.rsqrt(tl.div_rn(squares, D * 1.0) + branch_norm[2])
        _store(branch_norm[1], line, of_branch, live)
        u = _normed_branch(u, of_branch, branch_norm[0], head, HEAD, D)
    value = stream_piece(x, u, gate, branch_bias, head, head_mask, HEAD, D)
    _store(x1, line * D + head, value, head_mask)
    if TAIL > 0:
        tail = _tail_columns(HEAD, TAIL, ROWS)
        tail_mask = mask_of(live, tail, HEAD + TAIL, D)
        if branch_norm is not None:
            tail_u = _normed_branch(early_u, of_branch, branch_norm[0], tail, HEAD + TAIL, D)
        else:
            tail_u = load_piece(branch, tail, tail_mask) if branch is not None else None
        tail_value = stream_piece(x, tail_u, gate, branch_bias, tail, tail_mask, HEAD + TAIL, D)
        _store(x1, line * D + tail, tail_value, tail_mask)

    if h is not None:
        if S == 2:
            mu = tl.zeros([ROWS, 1], tl.float32)
            # The second turn takes what rounding kept from the mean in the first. It leaves a constant row exactly zero.
            for _ in tl.static_range(2):
                apart = tl.sum(value, 1, keep_dims=True)
                if TAIL > 0:
                    apart += tl.sum(tail_value, 1, keep_dims=True)
                apart = tl.div_rn(apart, D * 1.0)
                mu += apart
                value = centred(value, apart, head, HEAD, D)
                if TAIL > 0:
                    tail_value = centred(tail_value, apart, tail, HEAD + TAIL, D)
            _store(stats, line * S, mu, live)
        squares = tl.sum(value * value, 1, keep_dims=True)
        if TAIL > 0:
            squares += tl.sum(tail_value * tail_value, 1, keep_dims=True)
        r = tl.rsqrt(tl.div_rn(squares, D * 1.0) + eps)
        if S == 2:
            # Zero times a sum that has overflowed is NaN: such a row is lost, and not a row of zeros.
            r += 0.0 * squares
        _store(stats, line * S + (S - 1), r, live)

        value = modulated(value * r, shift, scale, weight, bias, head, HEAD, D)
        _store(h, line * D + head, value, head_mask)
        if TAIL > 0:
            tail_value = modulated(tail_value * r, shift, scale, weight, bias, tail, HEAD + TAIL, D)
            _store(h, line * D + tail, tail_value, tail_mask)


# ---- Backward --------------------------------------------------------------------------------------------------------


@jit
def _factor(scale, weight, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """a = (1 + scale)·weight, the derivative of h by x̂, in the shape of ``columns``."""
    factor = tl.full(columns.shape, 1.0, tl.float32)
    if scale is not None:
        factor += channels_of(scale, columns, END, D)
    if weight is not None:
        factor *= channels_of(weight, columns, END, D)
    return factor


@jit
def _normed(x1, mu, r, columns, mask):  # type: ignore[no-untyped-def]
    """One piece of x̂ = (x1 - mean)·rstd. It is not zero outside the row, but sums multiply it by dh, which is zero there."""
    value = load_piece(x1, columns, mask).to(tl.float32)
    if mu is not None:
        value -= mu
    return value * r


@jit
def _through_norm(dnormed, normed, r, along_mean, along_normed):  # type: ignore[no-untyped-def]
    """One piece of rstd·(dx̂ - mean_d(dx̂) - x̂·mean_d(dx̂·x̂)). ``along_mean`` is mean_d(dx̂), None for rmsnorm."""
    dx = dnormed - normed * along_normed
    if along_mean is not None:
        dx -= along_mean
    return dx * r


@jit
def _along(piece, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of each row of a piece, (ROWS, 1), or a scalar for a single row.

    A scalar has no layout. A tensor has the layout of its piece, and to add the sums of head and tail, the compiler would
    convert a whole piece through shared memory.
    """
    if ROWS == 1:
        return tl.sum(tl.sum(piece, 1), 0)
    else:
        return tl.sum(piece, 1, keep_dims=True)


@jit
def _folded(piece, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tail piece in the form that a sum over rows accumulates: one row if FOLD is set, else all rows, to be summed at the end."""
    if FOLD:
        return over_rows(piece)
    else:
        return piece


@jit
def _store_sum(  # type: ignore[no-untyped-def]
    partial, at: tl.constexpr, total, tail_total, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """Stores one of P, Q, R and S as entry ``at`` of its chunk's sums; -1 marks a sum that is not needed."""
    if at >= 0:
        tl.store(partial + at * D + tl.arange(0, HEAD)[None, :], total)
        if TAIL > 0:
            tail = HEAD + tl.arange(0, TAIL)[None, :]
            if HEAD + TAIL > D:
                tl.store(partial + at * D + tail, over_rows(tail_total), tail < D)
            else:
                tl.store(partial + at * D + tail, over_rows(tail_total))


@jit
def backward_rows(  # type: ignore[no-untyped-def]
    dx1, dx1_b, dx1_n, dx1_d, dh, dh_b, dh_n, dh_d, x1, x1_b, x1_n, x1_d, branch, branch_b, branch_n, branch_d,
    gate, gate_b, scale, scale_b, weight, stats, dx, dbranch, partial, N, chunks, chunk_rows,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    ONE_WARP: tl.constexpr, OF_ROWS: tl.constexpr,
    SUM_P: tl.constexpr, SUM_Q: tl.constexpr, SUM_R: tl.constexpr, SUM_S: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """OF_ROWS: dx is needed, as an output or for dbranch, dgate or dbranch_bias. SUMS: how many of P, Q, R and S are needed."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    first = (program % chunks) * chunk_rows
    last = tl.minimum(first + chunk_rows, N)
    gate = of_sample((gate, gate_b), sample) if gate is not None else None
    scale = of_sample((scale, scale_b), sample) if scale is not None else None
    tokens = (dx1, dx1_b, dx1_n, dx1_d), (dh, dh_b, dh_n, dh_d), (x1, x1_b, x1_n, x1_d), (branch, branch_b, branch_n, branch_d)
    outs = dx, dbranch, partial, None, None, None
    walk(
        tokens, gate, scale, None, weight, None, stats, None, outs, sample, None, first, last, N,
        D, S, HEAD, TAIL, ROWS, ONE_WARP, OF_ROWS, False, SUM_P, SUM_Q, SUM_R, SUM_S, SUMS,
    )  # fmt: skip


@jit
def rows_of_vector(vector, sample, rows):  # type: ignore[no-untyped-def]
    """Pointers to rows of one sample of a (B, K, D) vector, given with the strides of samples and rows."""
    return vector[0] + sample * vector[1] + rows * vector[2]


@jit
def _of_rows(stats, first, line, live, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One number of each row, (ROWS, 1), or a scalar for a single row, the ``first``."""
    if ROWS == 1:
        return tl.load(stats + first)
    else:
        return tl.load(stats + line, live, 0.0)


@jit
def _through_gate(value, gate, weight, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of value · gate · weight, as far as these are there."""
    if gate is not None:
        value *= channels_of(gate, columns, END, D)
    if weight is not None:
        value *= channels_of(weight, columns, END, D)
    return value


@jit
def _biased(u, branch_bias, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of branch + branch_bias in fp32."""
    value = u.to(tl.float32)
    if branch_bias is not None:
        value += channels_of(branch_bias, columns, END, D)
    return value


@jit
def _through_own(  # type: ignore[no-untyped-def]
    gradient, normed, scale, weight, bias, dshift, dscale, at, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    """Of a token with vectors of its own: stores a piece of dshift and dscale, and returns that of (1 + scale)·dh."""
    _store(dshift, at, gradient, mask)
    if dscale is not None:
        unmodulated = normed
        if weight is not None:
            unmodulated *= channels_of(weight, columns, END, D)
        if bias is not None:
            unmodulated += channels_of(bias, columns, END, D)
        _store(dscale, at, gradient * unmodulated, mask)
    if scale is not None:
        gradient *= 1.0 + channels_of(scale, columns, END, D)
    return gradient


@jit
def walk(  # type: ignore[no-untyped-def]
    tokens, gate, scale, branch_bias, weight, bias, stats, branch_norm, outs, sample, order, first, last, N,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    ONE_WARP: tl.constexpr, OF_ROWS: tl.constexpr, OWN: tl.constexpr,
    SUM_P: tl.constexpr, SUM_Q: tl.constexpr, SUM_R: tl.constexpr, SUM_S: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The backward of the tokens of a chunk, ``first`` to ``last``, or of those that ``order`` has in these places.

    ``tokens``: dx1, dh, x1 and the branch with their strides; ``outs``: dx, dbranch, partial, dgate, dshift, dscale. OWN: each
    token has vectors of its own, given with their strides, and the last three take their gradients. Else a vector is a pointer.
    ``branch_norm``: weight and statistics of a norm of the branch, or None; R and S are then the T of norm/branch_norm.py.
    """
    dx1, dh, branch = tokens[0][0], tokens[1][0], tokens[3][0]
    dx, dbranch, partial, dgate, dshift, dscale = outs[0], outs[1], outs[2], outs[3], outs[4], outs[5]
    AT_USE: tl.constexpr = ONE_WARP or OWN
    head = tl.arange(0, HEAD).to(tl.int64)[None, :]
    if TAIL > 0:
        tail = _tail_columns(HEAD, TAIL, ROWS)
    if dh is not None and OF_ROWS and not AT_USE:
        factor = _factor(scale, weight, head, HEAD, D)
        if TAIL > 0:
            tail_factor = _factor(scale, weight, tail, HEAD + TAIL, D)
    if dbranch is not None and gate is not None and not AT_USE and branch_norm is None:
        g = channels_of(gate, head, HEAD, D)
        if TAIL > 0:
            tail_g = channels_of(gate, tail, HEAD + TAIL, D)

    p = tl.zeros([1, HEAD], tl.float32)
    q = tl.zeros([1, HEAD], tl.float32)
    r = tl.zeros([1, HEAD], tl.float32)
    s = tl.zeros([1, HEAD], tl.float32)
    TAIL_ROWS: tl.constexpr = 1 if ONE_WARP else ROWS
    SPAN: tl.constexpr = TAIL if TAIL > 0 else 1
    tail_p = tl.zeros([TAIL_ROWS, SPAN], tl.float32)
    tail_q = tl.zeros([TAIL_ROWS, SPAN], tl.float32)
    tail_r = tl.zeros([TAIL_ROWS, SPAN], tl.float32)
    tail_s = tl.zeros([TAIL_ROWS, SPAN], tl.float32)

    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = rows < last
        if order is not None:
            rows = tl.load(order + rows, live, 0)
        line = sample * N + rows
        mask = mask_of(live, head, HEAD, D)
        stream_rows = rows_of(tokens[0], sample, rows) if dx1 is not None else None
        branch_rows = rows_of(tokens[3], sample, rows) if branch is not None else None
        if TAIL > 0:
            tail_mask = mask_of(live, tail, HEAD + TAIL, D)

        # A reduction across warps is a barrier, and the compiler moves no load across it. So loads that are used last are issued
        # before it, and their values keep their own dtype, which takes fewer registers. One warp has no barrier but too few
        # registers for that, so it loads each value, also of vectors, where it is used.
        if not ONE_WARP:
            if dx1 is not None:
                stream = load_piece(stream_rows, head, mask)
                if TAIL > 0:
                    tail_stream = load_piece(stream_rows, tail, tail_mask)
            if branch is not None:
                u = load_piece(branch_rows, head, mask)
                if TAIL > 0:
                    tail_u = load_piece(branch_rows, tail, tail_mask)

        if dh is not None:
            if ROWS == 1:
                row_stats = stats + (sample * N + (tl.load(order + start) if order is not None else start)) * S
                mu = tl.load(row_stats) if S == 2 else None
                scaling = tl.load(row_stats + (S - 1))
            else:
                mu = tl.load(stats + line * S, live, 0.0) if S == 2 else None
                scaling = tl.load(stats + line * S + (S - 1), live, 0.0)
            dh_rows = rows_of(tokens[1], sample, rows)
            x1_rows = rows_of(tokens[2], sample, rows)
            dnormed = load_piece(dh_rows, head, mask).to(tl.float32)
            normed = _normed(x1_rows, mu, scaling, head, mask)
            if TAIL > 0:
                tail_dnormed = load_piece(dh_rows, tail, tail_mask).to(tl.float32)
                tail_normed = _normed(x1_rows, mu, scaling, tail, tail_mask)
            if OWN:
                own_scale = rows_of_vector(scale, sample, rows) if scale[0] is not None else None
                dnormed = _through_own(
                    dnormed, normed, own_scale, weight, bias, dshift, dscale, line * D + head, head, mask, HEAD, D
                )
                if TAIL > 0:
                    tail_dnormed = _through_own(
                        *(tail_dnormed, tail_normed, own_scale, weight, bias, dshift, dscale),
                        *(line * D + tail, tail, tail_mask, HEAD + TAIL, D),
                    )
            if SUM_P >= 0:
                p += over_rows(dnormed)
                if TAIL > 0:
                    tail_p += _folded(tail_dnormed, ONE_WARP)
            if SUM_Q >= 0:
                q += over_rows(dnormed * normed)
                if TAIL > 0:
                    tail_q += _folded(tail_dnormed * tail_normed, ONE_WARP)

        if dh is not None and OF_ROWS:
            if AT_USE:
                factor = _factor(None if OWN else scale, weight, head, HEAD, D)
                if TAIL > 0:
                    tail_factor = _factor(None if OWN else scale, weight, tail, HEAD + TAIL, D)
            dnormed *= factor
            along_normed = _along(dnormed * normed, ROWS)
            along_mean = _along(dnormed, ROWS) if S == 2 else None
            if TAIL > 0:
                tail_dnormed *= tail_factor
                along_normed += _along(tail_dnormed * tail_normed, ROWS)
                if S == 2:
                    along_mean += _along(tail_dnormed, ROWS)
            along_normed = tl.div_rn(along_normed, D * 1.0)
            if S == 2:
                along_mean = tl.div_rn(along_mean, D * 1.0)
            d = _through_norm(dnormed, normed, scaling, along_mean, along_normed)
            if TAIL > 0:
                tail_d = _through_norm(tail_dnormed, tail_normed, scaling, along_mean, along_normed)
        if dx1 is not None:
            if ONE_WARP:
                stream = load_piece(stream_rows, head, mask)
                if TAIL > 0:
                    tail_stream = load_piece(stream_rows, tail, tail_mask)
            d = d + stream.to(tl.float32) if dh is not None else stream.to(tl.float32)
            if TAIL > 0:
                tail_d = tail_d + tail_stream.to(tl.float32) if dh is not None else tail_stream.to(tl.float32)

        if dx is not None:
            _store(dx, line * D + head, d, mask)
            if TAIL > 0:
                _store(dx, line * D + tail, tail_d, tail_mask)
        if OWN and OF_ROWS:
            if dgate is not None:
                if ONE_WARP:
                    u = load_piece(branch_rows, head, mask)
                    if TAIL > 0:
                        tail_u = load_piece(branch_rows, tail, tail_mask)
                _store(dgate, line * D + head, d * _biased(u, branch_bias, head, HEAD, D), mask)
                if TAIL > 0:
                    _store(dgate, line * D + tail, tail_d * _biased(tail_u, branch_bias, tail, HEAD + TAIL, D), tail_mask)
            if gate[0] is not None and (dbranch is not None or SUM_S >= 0):
                own_gate = rows_of_vector(gate, sample, rows)
                d *= channels_of(own_gate, head, HEAD, D)
                if TAIL > 0:
                    tail_d *= channels_of(own_gate, tail, HEAD + TAIL, D)
        if branch_norm is not None:
            if ONE_WARP:
                u = load_piece(branch_rows, head, mask)
                if TAIL > 0:
                    tail_u = load_piece(branch_rows, tail, tail_mask)
            of_branch = _of_rows(branch_norm[1], sample * N + start, line, live, ROWS)
            u = _normed_branch(u, of_branch, None, head, HEAD, D)
            along_u = _along(_through_gate(d * u, gate, branch_norm[0], head, HEAD, D), ROWS)
            if TAIL > 0:
                tail_u = _normed_branch(tail_u, of_branch, None, tail, HEAD + TAIL, D)
                along_u += _along(_through_gate(tail_d * tail_u, gate, branch_norm[0], tail, HEAD + TAIL, D), ROWS)
            along_u = tl.div_rn(along_u, D * 1.0)
            if dbranch is not None:
                through = _through_gate(d, gate, branch_norm[0], head, HEAD, D)
                _store(dbranch, line * D + head, _through_norm(through, u, of_branch, None, along_u), mask)
                if TAIL > 0:
                    tail_through = _through_gate(tail_d, gate, branch_norm[0], tail, HEAD + TAIL, D)
                    _store(dbranch, line * D + tail, _through_norm(tail_through, tail_u, of_branch, None, along_u), tail_mask)
            d *= u
            if TAIL > 0:
                tail_d *= tail_u
            if SUM_R >= 0:
                r += over_rows(d)
                if TAIL > 0:
                    tail_r += _folded(tail_d, ONE_WARP)
        elif dbranch is not None:
            if gate is not None and ONE_WARP and not OWN:
                g = channels_of(gate, head, HEAD, D)
                if TAIL > 0:
                    tail_g = channels_of(gate, tail, HEAD + TAIL, D)
            gated: tl.constexpr = gate is not None and not OWN
            _store(dbranch, line * D + head, g * d if gated else d, mask)
            if TAIL > 0:
                _store(dbranch, line * D + tail, tail_g * tail_d if gated else tail_d, tail_mask)
        if SUM_R >= 0 and branch_norm is None:
            if ONE_WARP:
                u = load_piece(branch_rows, head, mask)
                if TAIL > 0:
                    tail_u = load_piece(branch_rows, tail, tail_mask)
            r += over_rows(d * u.to(tl.float32))
            if TAIL > 0:
                tail_r += _folded(tail_d * tail_u.to(tl.float32), ONE_WARP)
        if SUM_S >= 0:
            s += over_rows(d)
            if TAIL > 0:
                tail_s += _folded(tail_d, ONE_WARP)

    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * (SUMS * D)
        _store_sum(partial, SUM_P, p, tail_p, D, HEAD, TAIL)
        _store_sum(partial, SUM_Q, q, tail_q, D, HEAD, TAIL)
        _store_sum(partial, SUM_R, r, tail_r, D, HEAD, TAIL)
        _store_sum(partial, SUM_S, s, tail_s, D, HEAD, TAIL)


@jit
def add_chunks(  # type: ignore[no-untyped-def]
    partial, chunks, gate, gate_b, scale, scale_b, branch_bias, weight, bias, dgate, dshift, dscale, terms,
    D: tl.constexpr, SUM_P: tl.constexpr, SUM_Q: tl.constexpr, SUM_R: tl.constexpr, SUM_S: tl.constexpr,
    SUMS: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_BIAS: tl.constexpr, OF_BRANCH_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """OF_WEIGHT, OF_BIAS, OF_BRANCH_BIAS: which of these gradients are wanted. ``terms`` holds their terms in this order."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    sample = (program // blocks).to(tl.int64)
    columns = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D

    p = tl.zeros([COLUMNS], tl.float32)
    q = tl.zeros([COLUMNS], tl.float32)
    r = tl.zeros([COLUMNS], tl.float32)
    s = tl.zeros([COLUMNS], tl.float32)
    for chunk in range(chunks):
        at = partial + (sample * chunks + chunk) * (SUMS * D) + columns
        if SUM_P >= 0:
            p += tl.load(at + SUM_P * D, inside, 0.0)
        if SUM_Q >= 0:
            q += tl.load(at + SUM_Q * D, inside, 0.0)
        if SUM_R >= 0:
            r += tl.load(at + SUM_R * D, inside, 0.0)
        if SUM_S >= 0:
            s += tl.load(at + SUM_S * D, inside, 0.0)

    out = sample * D + columns
    _store(dshift, out, p, inside)
    if dscale is not None:
        through_weight = q
        if weight is not None:
            through_weight *= channels_of(weight, columns, D + 1, D)
        if bias is not None:
            through_weight += channels_of(bias, columns, D + 1, D) * p
        _store(dscale, out, through_weight, inside)
    if dgate is not None:
        through_gate = r
        if branch_bias is not None:
            through_gate += channels_of(branch_bias, columns, D + 1, D) * s
        _store(dgate, out, through_gate, inside)

    if terms is not None:
        terms += sample * ((OF_WEIGHT + OF_BIAS + OF_BRANCH_BIAS) * D) + columns
        if scale is not None:
            factor = 1.0 + channels_of(of_sample((scale, scale_b), sample), columns, D + 1, D)
            p *= factor
            q *= factor
        if gate is not None:
            s *= channels_of(of_sample((gate, gate_b), sample), columns, D + 1, D)
        if OF_WEIGHT:
            tl.store(terms, q, inside)
            terms += D
        if OF_BIAS:
            tl.store(terms, p, inside)
            terms += D
        if OF_BRANCH_BIAS:
            tl.store(terms, s, inside)


# ---- Tiles and constants, computed once for each combination of width, dtypes and wanted gradients -------------------

# The keys are the width and the bytes of an element of the narrowest (B, N, D) tensor. Rows and warps are chosen so that 128-bit
# accesses move the head, and where possible the tail, and no registers spill.
_FORWARD = {
    (384, 2): Tile(2, 1),
    (384, 4): Tile(2, 1),
    (768, 2): Tile(2, 2, registers=255),
    (768, 4): Tile(2, 2),
    (1024, 2): Tile(2, 4),
    (1024, 4): Tile(2, 4),
    (1152, 2): Tile(2, 4),
    (1152, 4): Tile(2, 4),
}
_BACKWARD = {
    (384, 2): Tile(2, 1, registers=255),
    (384, 4): Tile(1, 1, registers=255),
    (768, 2): Tile(1, 1),
    (768, 4): Tile(1, 2),
    (1024, 2): Tile(2, 4),
    (1024, 4): Tile(2, 4),
    (1152, 2): Tile(1, 4),
    (1152, 4): Tile(1, 4),
}
_SUMS_TILE = Tile(1, 4)
_PROGRAMS = 1024
_SHORTEST_CHUNK = 16
_COLUMNS = 128
_SAMPLES, _SAMPLE_COLUMNS = 32, 32

Constants = dict[str, Any]
Dtypes = tuple["torch.dtype | None", ...]


def _other_width(width: int) -> Tile:
    """The tile for a width without an entry: about 1024 channels at a time, 256 a warp; wider rows one at a time, in more warps."""
    head, _ = pieces(width)
    return Tile(max(1, min(8, 1024 // head)), max(4, min(32, head // 256)))


def _laid_out(tiles: dict[tuple[int, int], Tile], width: int, dtypes: Dtypes, norm: str) -> tuple[Tile, Constants]:
    """The tile, and the constants that describe it to a kernel, from the dtypes of the (B, N, D) tensors (None: absent)."""
    narrowest = min(dtype.itemsize for dtype in dtypes if dtype is not None)
    tile = tiles.get((width, narrowest)) or _other_width(width)
    head, tail = pieces(width)
    columns = 1 if norm == "rmsnorm" else 2
    return tile, {"D": width, "S": columns, "HEAD": head, "TAIL": tail, "ROWS": tile.rows}


@functools.cache
def forward_plan(width: int, norm: str, *dtypes: torch.dtype | None) -> tuple[Tile, Constants]:
    """The tile and the constants of ``forward_rows``."""
    return _laid_out(_FORWARD, width, dtypes, norm)


@functools.cache
def backward_plan(
    width: int,
    norm: str,
    wanted: Wanted,
    has_branch_bias: bool,
    has_bias: bool,
    *dtypes: torch.dtype | None,
    branch_norm: bool = False,
) -> tuple[Tile, Constants, Constants, Constants]:
    """The tile and the constants of ``backward_rows``, the constants of ``add_chunks``, and those of ``add_samples``.

    With a ``branch_norm`` its weight is in the place of the branch's bias, and T in that of S, or else of R.
    """
    of_x, of_branch, of_gate, of_shift, of_scale, of_branch_bias, of_weight, of_bias = (dtype is not None for dtype in wanted)
    needed = {
        "SUM_P": of_shift or of_bias or (of_scale and has_bias),
        "SUM_Q": of_scale or of_weight,
        "SUM_R": of_gate and not (branch_norm and has_branch_bias),
        "SUM_S": of_branch_bias or (of_gate and has_branch_bias),
    }
    names = [name for name, need in needed.items() if need]
    sums: Constants = {name: names.index(name) if need else -1 for name, need in needed.items()}
    sums |= {"SUMS": len(names)}
    tile, rows = _laid_out(_BACKWARD, width, dtypes, norm)
    of_rows = of_x or of_branch or of_gate or of_branch_bias
    rows |= {"ONE_WARP": tile.warps == 1, "OF_ROWS": of_rows, **sums}
    terms = {"OF_WEIGHT": of_weight, "OF_BIAS": of_bias, "OF_BRANCH_BIAS": of_branch_bias}
    chunks = {"D": width, **sums, **terms, "COLUMNS": _COLUMNS}
    samples = {"D": width, "KINDS": sum(terms.values()), "SAMPLES": _SAMPLES, "COLUMNS": _SAMPLE_COLUMNS}
    return tile, rows, chunks, samples


@remembered_by_shape
def chunking(batch: int, length: int, rows: int) -> tuple[int, int]:
    """(chunks of a sample, rows of a chunk) for a backward that walks through tokens, ``rows`` at a time.

    About ``_PROGRAMS`` programs in all fill a GPU. In a chunk of few rows, the traffic of its partial sums would outweigh theirs.
    """
    wanted = max(1, min(ceil_div(_PROGRAMS, max(batch, 1)), ceil_div(length, _SHORTEST_CHUNK)))
    chunk_rows = ceil_div(max(ceil_div(length, wanted), 1), rows) * rows
    return ceil_div(length, chunk_rows), chunk_rows


# ---- Launch. ``gated_residual_norm`` serves all three ops, which pass None for the arguments that they do not have. --


def _new(dtype: torch.dtype | None, device: torch.device, *shape: int) -> Tensor | None:
    """An uninitialised tensor, or None without a dtype. ``torch.empty`` takes twice as long with a tuple as with separate sizes."""
    return None if dtype is None else torch.empty(*shape, dtype=dtype, device=device)


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


@GATED_RESIDUAL_NORM.implement("triton", refuse=_triton.refuse)
def gated_residual_norm(  # type: ignore[no-untyped-def]
    x, branch, gate, shift, scale, branch_bias, weight, bias, norm, eps, out_dtype, keep
):
    """x1, h and stats. x1 is None without a branch, h without ``out_dtype``, stats without ``keep``."""
    device = x.device
    batch, length, width = x.shape
    tile, constants = forward_plan(int(width), norm, x.dtype, _dtype(branch), out_dtype)
    blocks = ceil_div(length, tile.rows)
    x1 = None if branch is None else contiguous(x)
    h = None if out_dtype is None else contiguous(x, out_dtype)
    stats = _new(torch.float32, device, batch, length, constants["S"]) if keep else None
    rows = (*with_strides(x), *with_strides(branch))
    of_samples = (*per_sample(gate), *per_sample(shift), *per_sample(scale))
    parameters = (packed(branch_bias), packed(weight), packed(bias))
    outs = (x1, h, stats, length, blocks, eps)
    _triton.launch(forward_rows, batch * blocks, tile, device, *rows, *of_samples, *parameters, *outs, **constants)
    return x1, h, stats


@MODULATE_NORM.implement("triton", refuse=_triton.refuse)
def modulate_norm(x, shift, scale, weight, bias, norm, eps, out_dtype, keep):  # type: ignore[no-untyped-def]
    _, h, stats = gated_residual_norm(x, None, None, shift, scale, None, weight, bias, norm, eps, out_dtype, keep)
    return h, stats


@GATED_RESIDUAL.implement("triton", refuse=_triton.refuse)
def gated_residual(x, branch, gate, branch_bias):  # type: ignore[no-untyped-def]
    x1, _, _ = gated_residual_norm(x, branch, gate, None, None, branch_bias, None, None, "layernorm", 0.0, None, False)
    return x1


def add_sums(  # type: ignore[no-untyped-def]
    partial, gate, scale, branch_bias, weight, bias, wanted: Dtypes, of_chunks: Constants, of_samples: Constants
):
    """The wanted gradients of vectors from the partial sums: of gate, shift, scale, branch_bias, weight, bias; None for the others.

    ``gate`` and ``scale`` come with their batch strides.
    """
    of_gate, of_shift, of_scale, of_branch_bias, of_weight, of_bias = wanted
    device = partial.device
    batch, chunks, _, width = partial.shape
    kinds = of_samples["KINDS"]
    dgate = _new(of_gate, device, batch, width)
    dshift = _new(of_shift, device, batch, width)
    dscale = _new(of_scale, device, batch, width)
    terms = _new(torch.float32, device, batch, kinds, width) if kinds else None
    programs = batch * ceil_div(width, _COLUMNS)
    vectors = (*gate, *scale, packed(branch_bias), packed(weight), packed(bias), dgate, dshift, dscale, terms)
    _triton.launch(add_chunks, programs, _SUMS_TILE, device, partial, chunks, *vectors, **of_chunks)
    if not kinds:
        return dgate, dshift, dscale, None, None, None

    dweight = _new(of_weight, device, width)
    dbias = _new(of_bias, device, width)
    dbranch_bias = _new(of_branch_bias, device, width)
    summed = [*(out for out in (dweight, dbias, dbranch_bias) if out is not None), None, None][:3]
    programs = ceil_div(width, _SAMPLE_COLUMNS)
    _triton.launch(add_samples, programs, _SUMS_TILE, device, terms, batch, *summed, **of_samples)
    return dgate, dshift, dscale, dbranch_bias, dweight, dbias


@GATED_RESIDUAL_NORM.gradients.implement("triton", refuse=_triton.refuse)
def gated_residual_norm_backward(  # type: ignore[no-untyped-def]
    dx1, dh, x1, branch, gate, scale, branch_bias, weight, bias, stats, norm, wanted
):
    """The wanted gradients, None for the others: first those of (B, N, D) inputs, then those of vectors, from sums over rows."""
    of_x, of_branch, of_gate, *_ = wanted
    like = dx1 if dh is None else dh
    device = like.device
    batch, length, width = like.shape
    if of_gate is None:
        branch = None
    tile, constants, of_chunks, of_samples = backward_plan(
        *(int(width), norm, wanted, branch_bias is not None, bias is not None),
        *(_dtype(dx1), _dtype(dh), _dtype(x1), _dtype(branch)),
    )
    if not constants["OF_ROWS"]:
        dx1 = None
    sums = constants["SUMS"]
    chunks, chunk_rows = chunking(batch, length, tile.rows)
    dx = None if of_x is None else contiguous(like, of_x)
    dbranch = None if of_branch is None else contiguous(like, of_branch)
    partial = _new(torch.float32, device, batch, chunks, sums, width) if sums else None
    rows = (*with_strides(dx1), *with_strides(dh), *with_strides(x1), *with_strides(branch))
    gate, scale, weight = per_sample(gate), per_sample(scale), packed(weight)
    outs = (dx, dbranch, partial, length, chunks, chunk_rows)
    _triton.launch(*(backward_rows, batch * chunks, tile, device, *rows, *gate, *scale, weight, packed(stats), *outs), **constants)
    if partial is None:
        return dx, dbranch, None, None, None, None, None, None
    return dx, dbranch, *add_sums(partial, gate, scale, branch_bias, weight, bias, wanted[2:], of_chunks, of_samples)


@MODULATE_NORM.gradients.implement("triton", refuse=_triton.refuse)
def modulate_norm_backward(dh, x, scale, weight, bias, stats, norm, wanted):  # type: ignore[no-untyped-def]
    of_x, of_shift, of_scale, of_weight, of_bias = wanted
    dx, _, _, dshift, dscale, _, dweight, dbias = gated_residual_norm_backward(
        *(None, dh, x, None, None, scale, None, weight, bias, stats, norm),
        (of_x, None, None, of_shift, of_scale, None, of_weight, of_bias),
    )
    return dx, dshift, dscale, dweight, dbias


@GATED_RESIDUAL.gradients.implement("triton", refuse=_triton.refuse)
def gated_residual_backward(dx1, branch, gate, branch_bias, wanted):  # type: ignore[no-untyped-def]
    of_branch, of_gate, of_bias = wanted
    _, dbranch, dgate, _, _, dbranch_bias, _, _ = gated_residual_norm_backward(
        *(dx1, None, None, branch, gate, None, branch_bias, None, None, None, "layernorm"),
        (None, of_branch, of_gate, None, None, of_bias, None, None),
    )
    return dbranch, dgate, dbranch_bias
