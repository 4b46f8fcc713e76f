"""The Triton kernels of ``final_layer`` and ``unpatchify``. Names and formulas are those at the top of final_layer.py.

An absent argument (branch, gate, scale ...) is None and its code is not compiled. V = p·p·O, the values of a patch.

    forward_rows     a program owns ``ROWS`` tokens of one sample. Reads x (and the branch) once, writes the image, and mean
                     and rstd of each row (B, N), fp32: 1 pass (2 with a branch).

    value_sums       a program owns ``VALUES`` values of one sample: reads W, writes slope and offset (B, V), fp32.

    row_means        a program owns ``ROWS`` tokens of one sample. Gathers dz and z from dout and out; writes the means of dx̂ and
                     dx̂·x̂ along each row (B, N), fp32. No (B, N, D) tensor is read.

    backward_columns a program owns ``COLUMNS`` channels and one group of chunks, a chunk being consecutive tokens of a sample.
                     Reads x (and the branch), writes dx (and dbranch): 2 passes (4), those of the whole backward. Adds up the
                     sums P, Q, R, S of adaln.py over each chunk; those that are needed go to partial sums
                     (B, chunks, sums, D), fp32, which ``add_chunks`` and ``add_samples`` of adaln_triton.py bring together.
                     For V <= 128 it adds up dW and dbias too, in partial sums (groups, V, D) and (groups, V), fp32, which
                     patch_embed_triton.py's ``add_groups`` brings together.

    weight_products  dW and dbias for V > 128, in the same kind of partial sums: a program owns ``COLUMNS`` channels and a group of
                     consecutive tokens. Reads x (and the branch) once more for every 256 values.

    place_values     unpatchify: a program owns part of one row of patches of one sample; writes the image side by side.
    gather_values    its backward: the same the other way round.

Arithmetic is fp32 on values widened after the load; x1 is rounded to x's dtype and h to the weight's, as the contract of the
op has it. Products take operands in the weight's dtype where both have it and accumulate in fp32; otherwise they are fp32
products, never TF32. Nothing is added atomically, no two programs write one element, and the numbers of chunks and groups depend
on shapes alone: same inputs, same bits.

A row is held in ``PIECES`` pieces of ``PIECE`` channels: 128 divides every width of the paper; other widths mask the last piece.
All tensors but norm_weight, norm_bias and branch_bias are read in place at any strides. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops import _triton, adaln_triton
from ditkernels.ops._triton import Tile, batch_stride, ceil_div, jit, packed, strides, tl
from ditkernels.ops.adaln_triton import (
    _centred,
    _channels,
    _load,
    _mask,
    _new_stream,
    _over_rows,
    _slope,
    _through_norm,
)
from ditkernels.ops.final_layer import (
    FINAL_LAYER,
    FINAL_LAYER_BACKWARD,
    UNPATCHIFY,
    UNPATCHIFY_BACKWARD,
)
from ditkernels.ops.patch_embed_triton import product_dtype, sum_groups, value_tile

# ------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------


@jit
def _image_offsets(rows, values, grid_w, s_o, s_y, s_x, P: tl.constexpr, O: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    """Where values (1, ..) of tokens (.., 1) lie in the image of their sample."""
    of_rows = (rows // grid_w * P).to(tl.int64) * s_y + (rows % grid_w * P).to(tl.int64) * s_x
    row, column = values // (P * O), values // O % P
    of_values = (values % O).to(tl.int64) * s_o + row.to(tl.int64) * s_y + column.to(tl.int64) * s_x
    return of_rows + of_values


@jit
def _patch_values(  # type: ignore[no-untyped-def]
    image, rows, values, grid_w, s_o, s_y, s_x, live, V: tl.constexpr, P: tl.constexpr
):
    """dz: values (1, ..) of tokens (.., 1), in the image's dtype, zero outside."""
    offsets = _image_offsets(rows, values, grid_w, s_o, s_y, s_x, P, V // (P * P))
    return tl.load(image + offsets, live & (values < V), 0.0)


@jit
def _weight_tile(weight, w_v, w_d, values, columns, V: tl.constexpr, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``values`` (.., 1) and channels ``columns`` (1, ..) of the weight, zero outside."""
    at = weight + values.to(tl.int64) * w_v + columns * w_d
    return tl.load(at, _mask(values < V, columns, END, D), 0.0)


@jit
def _modulated(normed, shift, scale, weight, bias, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of h = (x̂·weight + bias)·(1 + scale) + shift, in fp32."""
    if weight is not None:
        normed *= _channels(weight, columns, END, D)
    if bias is not None:
        normed += _channels(bias, columns, END, D)
    if scale is not None:
        normed *= 1.0 + _channels(scale, columns, END, D)
    if shift is not None:
        normed += _channels(shift, columns, END, D)
    return normed


@jit
def _stream_piece(  # type: ignore[no-untyped-def]
    x, x_d, branch, branch_d, gate, branch_bias, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    """One piece of x1 in fp32, rounded to x's dtype as the open stream would be."""
    value = _new_stream(x, x_d, branch, branch_d, gate, branch_bias, None, columns, mask, END, D)
    return value.to(x.dtype.element_ty).to(tl.float32)


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
    norm_weight,
    norm_bias,
    weight,
    w_v,
    w_d,
    bias,
    out,
    out_b,
    out_o,
    out_y,
    out_x,
    mean,
    rstd,
    N,
    blocks,
    grid_w,
    eps,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    tokens = (program % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    live = tokens < N
    rows = tokens.to(tl.int64)
    x += sample * x_b + rows * x_n
    if branch is not None:
        branch += sample * branch_b + rows * branch_n
    if gate is not None:
        gate += sample * gate_b
    if shift is not None:
        shift += sample * shift_b
    if scale is not None:
        scale += sample * scale_b

    # Sums along a row are kept per column of a piece to the end, so that warps meet once and not at every piece.
    stream = ()
    sums = tl.zeros([ROWS, PIECE], tl.float32)
    for i in tl.static_range(PIECES):
        columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
        mask = _mask(live, columns, (i + 1) * PIECE, D)
        piece = _stream_piece(x, x_d, branch, branch_d, gate, branch_bias, columns, mask, (i + 1) * PIECE, D)
        sums += piece
        stream = stream + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    if mean is not None:
        mu = tl.div_rn(tl.sum(sums, 1, keep_dims=True), D * 1.0)
        tl.store(mean + sample * N + rows, mu, live)
    else:
        mu = tl.zeros([ROWS, 1], tl.float32)

    squares = tl.zeros([ROWS, PIECE], tl.float32)
    for i in tl.static_range(PIECES):
        columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
        centred = _centred(stream[i], mu, columns, (i + 1) * PIECE, D)
        squares += centred * centred
    scaling = tl.rsqrt(tl.div_rn(tl.sum(squares, 1, keep_dims=True), D * 1.0) + eps)
    tl.store(rstd + sample * N + rows, scaling, live)

    hidden = ()
    for i in tl.static_range(PIECES):
        columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
        normed = (stream[i] - mu) * scaling
        h = _modulated(normed, shift, scale, norm_weight, norm_bias, columns, (i + 1) * PIECE, D)
        hidden = hidden + (h.to(weight.dtype.element_ty).to(PRODUCT),)  # type: ignore[assignment]  # noqa: RUF005

    out += sample * out_b
    for first in range(0, V, VALUES):
        places = first + tl.arange(0, VALUES)
        z = tl.zeros([ROWS, VALUES], tl.float32)
        for i in tl.static_range(PIECES):
            columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
            w = _weight_tile(weight, w_v, w_d, places[:, None], columns, V, (i + 1) * PIECE, D)
            z = tl.dot(hidden[i], tl.trans(w).to(PRODUCT), z, input_precision="ieee")
        values = places[None, :]
        if bias is not None:
            z += tl.load(bias + values, values < V, 0.0).to(tl.float32)
        at = out + _image_offsets(tokens, values, grid_w, out_o, out_y, out_x, P, V // (P * P))
        tl.store(at, z.to(out.dtype.element_ty), live & (values < V))


@jit
def _dh(  # type: ignore[no-untyped-def]
    dout,
    tokens,
    grid_w,
    dout_o,
    dout_y,
    dout_x,
    live,
    weight,
    w_v,
    w_d,
    columns,
    END: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of dh = Wᵀ·dz in fp32."""
    dh = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, V, VALUES):
        places = first + tl.arange(0, VALUES)
        dz = _patch_values(dout, tokens, places[None, :], grid_w, dout_o, dout_y, dout_x, live, V, P)
        w = _weight_tile(weight, w_v, w_d, places[:, None], columns, V, END, D)
        dh = tl.dot(dz.to(PRODUCT), w.to(PRODUCT), dh, input_precision="ieee")
    return dh


@jit
def value_sums(  # type: ignore[no-untyped-def]
    shift,
    shift_b,
    scale,
    scale_b,
    norm_weight,
    norm_bias,
    weight,
    w_v,
    w_d,
    bias,
    slopes,
    offsets,
    D: tl.constexpr,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    ROUND: tl.constexpr = (D + COLUMNS - 1) // COLUMNS * COLUMNS
    value_tiles: tl.constexpr = (V + VALUES - 1) // VALUES
    sample = (program // value_tiles).to(tl.int64)
    values = (program % value_tiles) * VALUES + tl.arange(0, VALUES)[:, None]
    if shift is not None:
        shift += sample * shift_b
    if scale is not None:
        scale += sample * scale_b

    slope = tl.zeros([VALUES, COLUMNS], tl.float32)
    offset = tl.zeros([VALUES, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        w = _weight_tile(weight, w_v, w_d, values, columns, V, ROUND, D).to(tl.float32)
        if slopes is not None:
            slope += w * _slope(scale, norm_weight, columns, ROUND, D)
        origin = tl.zeros([1, COLUMNS], tl.float32)
        offset += w * _modulated(origin, shift, scale, None, norm_bias, columns, ROUND, D)
    at = sample * V + values
    if slopes is not None:
        tl.store(slopes + at, tl.sum(slope, 1, keep_dims=True), values < V)
    total = tl.sum(offset, 1, keep_dims=True)
    if bias is not None:
        total += tl.load(bias + values, values < V, 0.0).to(tl.float32)
    tl.store(offsets + at, total, values < V)


@jit
def row_means(  # type: ignore[no-untyped-def]
    dout,
    dout_b,
    dout_o,
    dout_y,
    dout_x,
    out,
    out_b,
    out_o,
    out_y,
    out_x,
    slopes,
    offsets,
    mean_dnormed,
    mean_product,
    N,
    blocks,
    grid_w,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    tokens = (program % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    live = tokens < N
    line = sample * N + tokens
    dout += sample * dout_b
    out += sample * out_b

    dnormeds = tl.zeros([ROWS, VALUES], tl.float32)
    products = tl.zeros([ROWS, VALUES], tl.float32)
    for first in range(0, V, VALUES):
        values = first + tl.arange(0, VALUES)[None, :]
        dz = _patch_values(dout, tokens, values, grid_w, dout_o, dout_y, dout_x, live, V, P).to(tl.float32)
        z = _patch_values(out, tokens, values, grid_w, out_o, out_y, out_x, live, V, P).to(tl.float32)
        products += dz * (z - tl.load(offsets + sample * V + values, values < V, 0.0))
        if slopes is not None:
            dnormeds += dz * tl.load(slopes + sample * V + values, values < V, 0.0)
    tl.store(mean_product + line, tl.div_rn(tl.sum(products, 1, keep_dims=True), D * 1.0), live)
    if mean_dnormed is not None:
        tl.store(mean_dnormed + line, tl.div_rn(tl.sum(dnormeds, 1, keep_dims=True), D * 1.0), live)


@jit
def backward_columns(  # type: ignore[no-untyped-def]
    dout,
    dout_b,
    dout_o,
    dout_y,
    dout_x,
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
    norm_weight,
    norm_bias,
    weight,
    w_v,
    w_d,
    mean,
    rstd,
    mean_dnormed,
    mean_product,
    dx,
    dbranch,
    partial,
    weight_partial,
    bias_partial,
    N,
    chunks,
    chunk_rows,
    all_chunks,
    group_chunks,
    grid_w,
    D: tl.constexpr,
    SUM_P: tl.constexpr,
    SUM_Q: tl.constexpr,
    SUM_R: tl.constexpr,
    SUM_S: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    VALUES: tl.constexpr,
    HELD: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    ROUND: tl.constexpr = tiles * COLUMNS
    sums: tl.constexpr = (SUM_P >= 0) + (SUM_Q >= 0) + (SUM_R >= 0) + (SUM_S >= 0)
    column_tile = program % tiles
    columns = (column_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = _mask(columns >= 0, columns, ROUND, D)
    group = program // tiles
    places = tl.arange(0, HELD)

    dw = tl.zeros([HELD, COLUMNS], tl.float32)
    db = tl.zeros([HELD], tl.float32)
    start = group * group_chunks
    for chunk in range(start, tl.minimum(start + group_chunks, all_chunks)):
        sample = (chunk // chunks).to(tl.int64)
        first = (chunk % chunks) * chunk_rows
        last = tl.minimum(first + chunk_rows, N)
        own_gate = None
        own_shift = None
        own_scale = None
        if gate is not None:
            own_gate = gate + sample * gate_b
        if shift is not None:
            own_shift = shift + sample * shift_b
        if scale is not None:
            own_scale = scale + sample * scale_b
        p = tl.zeros([1, COLUMNS], tl.float32)
        q = tl.zeros([1, COLUMNS], tl.float32)
        r = tl.zeros([1, COLUMNS], tl.float32)
        s = tl.zeros([1, COLUMNS], tl.float32)
        for block in range(first, last, ROWS):
            tokens = block + tl.arange(0, ROWS)[:, None]
            live = tokens < last
            rows = tokens.to(tl.int64)
            line = sample * N + rows
            mask = _mask(live, columns, ROUND, D)
            value = _load(x + sample * x_b + rows * x_n, x_d, columns, mask)
            if branch is not None:
                u = _load(branch + sample * branch_b + rows * branch_n, branch_d, columns, mask)
                through = u
                if branch_bias is not None:
                    through += _channels(branch_bias, columns, ROUND, D)
                if gate is not None:
                    through *= _channels(own_gate, columns, ROUND, D)
                value += through
            normed = value.to(x.dtype.element_ty).to(tl.float32)
            if mean is not None:
                normed -= tl.load(mean + line, live, 0.0)
            scaling = tl.load(rstd + line, live, 0.0)
            normed *= scaling
            dh = _dh(
                *(dout + sample * dout_b, tokens, grid_w, dout_o, dout_y, dout_x, live, weight, w_v, w_d),
                *(columns, ROUND, D, V, P, PRODUCT, VALUES, COLUMNS, ROWS),
            )
            if SUM_P >= 0:
                p += _over_rows(dh)
            if SUM_Q >= 0:
                q += _over_rows(dh * normed)
            if weight_partial is not None:
                h = _modulated(normed, own_shift, own_scale, norm_weight, norm_bias, columns, ROUND, D)
                h = h.to(weight.dtype.element_ty).to(PRODUCT)
                dz = _patch_values(
                    dout + sample * dout_b,
                    tokens,
                    places[None, :],
                    grid_w,
                    dout_o,
                    dout_y,
                    dout_x,
                    live,
                    V,
                    P,
                )
                dw = tl.dot(tl.trans(dz).to(PRODUCT), h, dw, input_precision="ieee")
                if bias_partial is not None:
                    db += tl.sum(dz.to(tl.float32), 0)
            along_mean = None
            if mean is not None:
                along_mean = tl.load(mean_dnormed + line, live, 0.0)
            dnormed = dh * _slope(own_scale, norm_weight, columns, ROUND, D)
            d = _through_norm(dnormed, normed, scaling, along_mean, tl.load(mean_product + line, live, 0.0))
            tl.store(dx + line * D + columns, d.to(dx.dtype.element_ty), mask)
            if dbranch is not None:
                through_gate = d * _channels(own_gate, columns, ROUND, D)
                tl.store(dbranch + line * D + columns, through_gate.to(dbranch.dtype.element_ty), mask)
                r += _over_rows(d * u)
            if SUM_S >= 0:
                s += _over_rows(d)

        if partial is not None:
            at = partial + tl.cast(chunk, tl.int64) * (sums * D) + columns
            if SUM_P >= 0:
                tl.store(at + SUM_P * D, p, inside)
            if SUM_Q >= 0:
                tl.store(at + SUM_Q * D, q, inside)
            if SUM_R >= 0:
                tl.store(at + SUM_R * D, r, inside)
            if SUM_S >= 0:
                tl.store(at + SUM_S * D, s, inside)

    if weight_partial is not None:
        lines = group.to(tl.int64) * V + places
        tl.store(weight_partial + lines[:, None] * D + columns, dw, (places < V)[:, None] & inside)
        if bias_partial is not None:  # noqa: SIM102 (the first is decided by the compiler)
            if column_tile == 0:
                tl.store(bias_partial + lines, db, places < V)


@jit
def weight_products(  # type: ignore[no-untyped-def]
    dout,
    dout_b,
    dout_o,
    dout_y,
    dout_x,
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
    norm_weight,
    norm_bias,
    weight,
    mean,
    rstd,
    partial,
    bias_partial,
    N,
    blocks,
    all_blocks,
    group_blocks,
    grid_w,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    value_tiles: tl.constexpr = (V + VALUES - 1) // VALUES
    ROUND: tl.constexpr = tiles * COLUMNS
    column_tile = program % tiles
    columns = (column_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    places = program // tiles % value_tiles * VALUES + tl.arange(0, VALUES)
    group = program // (tiles * value_tiles)

    dw = tl.zeros([VALUES, COLUMNS], tl.float32)
    db = tl.zeros([VALUES], tl.float32)
    start = group * group_blocks
    for block in range(start, tl.minimum(start + group_blocks, all_blocks)):
        sample = (block // blocks).to(tl.int64)
        tokens = (block % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
        live = tokens < N
        rows = tokens.to(tl.int64)
        mask = _mask(live, columns, ROUND, D)
        own_branch = None
        own_gate = None
        own_shift = None
        own_scale = None
        if branch is not None:
            own_branch = branch + sample * branch_b + rows * branch_n
        if gate is not None:
            own_gate = gate + sample * gate_b
        if shift is not None:
            own_shift = shift + sample * shift_b
        if scale is not None:
            own_scale = scale + sample * scale_b
        normed = _stream_piece(
            *(x + sample * x_b + rows * x_n, x_d, own_branch, branch_d, own_gate, branch_bias, columns, mask),
            *(ROUND, D),
        )
        if mean is not None:
            normed -= tl.load(mean + sample * N + rows, live, 0.0)
        normed *= tl.load(rstd + sample * N + rows, live, 0.0)
        h = _modulated(normed, own_shift, own_scale, norm_weight, norm_bias, columns, ROUND, D)
        dz = _patch_values(
            dout + sample * dout_b, tokens, places[None, :], grid_w, dout_o, dout_y, dout_x, live, V, P
        )
        h = h.to(weight.dtype.element_ty).to(PRODUCT)
        dw = tl.dot(tl.trans(dz).to(PRODUCT), h, dw, input_precision="ieee")
        if bias_partial is not None:
            db += tl.sum(dz.to(tl.float32), 0)

    lines = group.to(tl.int64) * V + places
    at = partial + lines[:, None] * D + columns
    tl.store(at, dw, _mask((places < V)[:, None], columns, ROUND, D))
    if bias_partial is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if column_tile == 0:
            tl.store(bias_partial + lines, db, places < V)


@jit
def place_values(  # type: ignore[no-untyped-def]
    tokens,
    tokens_b,
    tokens_n,
    tokens_v,
    image,
    grid_h,
    grid_w,
    parts,
    V: tl.constexpr,
    P: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    program = tl.program_id(0)
    band = program // parts
    sample = (band // grid_h).to(tl.int64)
    patch_row = band % grid_h
    O: tl.constexpr = V // (P * P)  # noqa: E741
    width = grid_w * P
    # In the order of the image: output channel, row in the patch, column of the image.
    element = (program % parts) * ELEMENTS + tl.arange(0, ELEMENTS)
    live = element < width * (P * O)
    line, column = element // width, element % width
    channel, row = line // P, line % P
    token = patch_row.to(tl.int64) * grid_w + column // P
    value = (row * P + column % P) * O + channel
    read = tl.load(tokens + sample * tokens_b + token * tokens_n + value.to(tl.int64) * tokens_v, live, 0.0)
    image_line = (sample * O + channel) * grid_h * P + patch_row * P + row
    tl.store(image + image_line * width + column, read, live)


@jit
def gather_values(  # type: ignore[no-untyped-def]
    image,
    image_b,
    image_o,
    image_y,
    image_x,
    tokens,
    grid_h,
    grid_w,
    parts,
    V: tl.constexpr,
    P: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    program = tl.program_id(0)
    band = program // parts
    sample = (band // grid_h).to(tl.int64)
    # In the order of the tokens: token of the row of patches, value.
    element = (program % parts) * ELEMENTS + tl.arange(0, ELEMENTS)
    live = element < grid_w * V
    token = (band % grid_h) * grid_w + element // V
    at = _image_offsets(token, element % V, grid_w, image_o, image_y, image_x, P, V // (P * P))
    read = tl.load(image + sample * image_b + at, live, 0.0)
    tl.store(tokens + band.to(tl.int64) * grid_w * V + element, read, live)


# ------------------------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------------------------

MAX_WIDTH = 4096
_PIECE = 128
_MOST_PIECES = 32
_ROWS = 16  # the least a product takes on tensor cores
_WARPS = {384: 8, 768: 8, 1024: 8, 1152: 8}

_PRODUCT_ROWS = 32
_GROUPS = 32
_ROWS_PER_VALUE = 8  # so that the partial sums of dW stay below 1/8 of the elements of x
_ACCUMULATORS = 16384

_SUMMED = Tile(32, 4)
_MEANS = Tile(64, 4)
_MERGED = 128  # values of a patch whose dW fits beside the rest in the registers

_ELEMENTS = 1024


def row_pieces(width: int, product: Any) -> tuple[int, int]:
    """(channels of a piece, pieces): as few channels as keeps the number of pieces small enough to be written out."""
    narrowest = max(16, 1 << (width - 1).bit_length())
    usual = _PIECE // 2 if product == tl.float32 else _PIECE
    piece = min(narrowest, max(usual, narrowest // _MOST_PIECES))
    return piece, ceil_div(width, piece)


def row_tile(width: int) -> Tile:
    return Tile(_ROWS, _WARPS.get(width) or max(4, min(16, (1 << (width - 1).bit_length()) // 128)))


def product_tile(values: int) -> tuple[int, int, Tile]:
    """(values, columns, tile) of ``weight_products``: up to 256 values, and as many columns as the registers hold."""
    held = value_tile(values, 256)
    return held, max(32, min(128, _ACCUMULATORS // held)), Tile(_PRODUCT_ROWS, 4 if held <= 32 else 8)


def column_tile(values: int) -> tuple[int, int, Tile]:
    """(values whose dW is held, columns, tile) of ``backward_columns``."""
    held = value_tile(values, _MERGED)
    return held, 64, Tile(32, 8)


def chunk_groups(batch: int, length: int, values: int) -> tuple[int, int, int, int]:
    """(chunks of a sample, rows of a chunk, groups, chunks of a group) of ``backward_columns``, from shapes alone."""
    chunks, chunk_rows = adaln_triton.chunking(batch, length, _PRODUCT_ROWS)
    shortest = ceil_div(_ROWS_PER_VALUE * min(values, _MERGED), chunk_rows)
    group_chunks = max(ceil_div(batch * chunks, _GROUPS), shortest)
    return chunks, chunk_rows, ceil_div(batch * chunks, group_chunks), group_chunks


def _values_at_a_time(product: Any) -> int:
    """fp32 operands are kept in registers, halves are read from shared memory as the tensor cores need them."""
    return 16 if product == tl.float32 else 64


def grouping(batch: int, length: int, values: int) -> tuple[int, int, int]:
    """(blocks of a sample, groups, blocks of a group) of ``weight_products``, from shapes alone."""
    blocks = ceil_div(length, _PRODUCT_ROWS)
    shortest = ceil_div(_ROWS_PER_VALUE * values, _PRODUCT_ROWS)
    group_blocks = max(ceil_div(batch * blocks, _GROUPS), shortest)
    return blocks, ceil_div(batch * blocks, group_blocks), group_blocks


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------


def _final_layer(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    grid_h: int,
    grid_w: int,
    patch_size: int,
    norm: str,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = x.shape
    values = weight.shape[0]
    channels = values // (patch_size * patch_size)
    image = x.new_empty((batch, channels, grid_h * patch_size, grid_w * patch_size), dtype=out_dtype)
    mean, rstd = adaln_triton._statistics(x, norm)
    gate, shift, scale, branch_bias, norm_weight, norm_bias, bias = map(
        packed, (gate, shift, scale, branch_bias, norm_weight, norm_bias, bias)
    )
    tile = row_tile(width)
    product = product_dtype(weight)
    piece, pieces = row_pieces(width, product)
    blocks = ceil_div(length, tile.rows)
    _triton.launch(
        forward_rows,
        batch * blocks,
        tile,
        x.device,
        *(x, *strides(x), branch, *strides(branch)),
        *(gate, batch_stride(gate), shift, batch_stride(shift), scale, batch_stride(scale)),
        *(branch_bias, norm_weight, norm_bias, weight, *weight.stride(), bias),
        *(image, *image.stride(), mean, rstd, length, blocks, grid_w, eps),
        D=width,
        V=values,
        P=patch_size,
        PRODUCT=product,
        PIECE=piece,
        PIECES=pieces,
        VALUES=value_tile(values, 32 if product == tl.float32 else 64),
        ROWS=tile.rows,
    )
    return image, adaln_triton._or_nothing(mean, x), rstd


class _Arguments(NamedTuple):
    """What the kernels of the backward read."""

    dout: Tensor
    out: Tensor
    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    branch_bias: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight: Tensor
    mean: Tensor | None
    rstd: Tensor
    grid_w: int
    patch_size: int


def _final_layer_backward(
    dout: Tensor,
    out: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grid_h: int,
    grid_w: int,
    patch_size: int,
    norm: str,
) -> tuple[Tensor, ...]:
    kept_mean, kept_rstd = adaln_triton._saved(mean, rstd, norm)
    arguments = _Arguments(
        dout=dout,
        out=out,
        x=x,
        branch=branch,
        gate=packed(gate),
        branch_bias=packed(branch_bias),
        shift=packed(shift),
        scale=packed(scale),
        norm_weight=packed(norm_weight),
        norm_bias=packed(norm_bias),
        weight=weight,
        mean=kept_mean,
        rstd=kept_rstd,
        grid_w=grid_w,
        patch_size=patch_size,
    )
    dx, dbranch, *dvectors, dweight, dbias = _gradients(arguments, packed(bias))
    gradients = (dx, dbranch, *dvectors, dweight, dbias)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _row_means(a: _Arguments, bias: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The means of dx̂ and of dx̂·x̂ along each row, (B, N) in fp32; none of the first for rmsnorm."""
    batch, length, width = a.x.shape
    values = a.weight.shape[0]
    means = None if a.mean is None else torch.empty_like(a.rstd)
    product_means = torch.empty_like(a.rstd)
    offsets = a.rstd.new_empty(batch, values)
    slopes = None if a.mean is None else torch.empty_like(offsets)
    held = value_tile(values, _SUMMED.rows)
    _triton.launch(
        value_sums,
        batch * ceil_div(values, held),
        _SUMMED,
        a.x.device,
        *(a.shift, batch_stride(a.shift), a.scale, batch_stride(a.scale), a.norm_weight, a.norm_bias),
        *(a.weight, *a.weight.stride(), bias, slopes, offsets),
        D=width,
        V=values,
        VALUES=held,
        COLUMNS=64,
    )
    blocks = ceil_div(length, _MEANS.rows)
    _triton.launch(
        row_means,
        batch * blocks,
        _MEANS,
        a.x.device,
        *(a.dout, *a.dout.stride(), a.out, *a.out.stride(), slopes, offsets, means, product_means),
        *(length, blocks, a.grid_w),
        D=width,
        V=values,
        P=a.patch_size,
        VALUES=held,
        ROWS=_MEANS.rows,
    )
    return means, product_means


def _gradients(a: _Arguments, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """All gradients in the order of the op's outputs, None for what is absent."""
    batch, length, width = a.x.shape
    values = a.weight.shape[0]
    places, count = adaln_triton._sum_indices(
        a.shift is not None or a.norm_bias is not None,
        a.scale is not None or a.norm_weight is not None,
        a.gate is not None,
        a.branch_bias is not None,
    )
    means = _row_means(a, bias)
    merged = values <= _MERGED
    product = product_dtype(a.dout, a.weight)
    held, columns, tile = column_tile(values)
    chunks, chunk_rows, groups, group_chunks = chunk_groups(batch, length, values)
    dx = adaln_triton._contiguous(a.x)
    dbranch = None if a.branch is None or a.gate is None else adaln_triton._contiguous(a.branch)
    partial = a.x.new_empty((batch, chunks, count, width), dtype=torch.float32) if count else None
    weight_partial = a.x.new_empty((groups, values * width), dtype=torch.float32) if merged else None
    bias_partial = (
        a.x.new_empty((groups, values), dtype=torch.float32) if merged and bias is not None else None
    )
    _triton.launch(
        backward_columns,
        groups * ceil_div(width, columns),
        tile,
        a.x.device,
        *(a.dout, *a.dout.stride(), a.x, *strides(a.x), a.branch, *strides(a.branch)),
        *(a.gate, batch_stride(a.gate), a.shift, batch_stride(a.shift), a.scale, batch_stride(a.scale)),
        *(a.branch_bias, a.norm_weight, a.norm_bias, a.weight, *a.weight.stride(), a.mean, a.rstd),
        *(*means, dx, dbranch, partial, weight_partial, bias_partial),
        *(length, chunks, chunk_rows, batch * chunks, group_chunks, a.grid_w),
        **places,
        D=width,
        V=values,
        P=a.patch_size,
        PRODUCT=product,
        VALUES=value_tile(values, _values_at_a_time(product)),
        HELD=held,
        COLUMNS=columns,
        ROWS=tile.rows,
    )
    dgate, dshift, dscale, dbranch_bias, dnorm_weight, dnorm_bias = _add_partial(
        partial, places, a.gate, a.shift, a.scale, a.branch_bias, a.norm_weight, a.norm_bias
    )
    if not merged:
        weight_partial, bias_partial = _weight_products(a, bias)
    assert weight_partial is not None
    dweight = sum_groups(weight_partial, a.weight)
    dbias = sum_groups(bias_partial, bias) if bias is not None and bias_partial is not None else None
    return dx, dbranch, dgate, dbranch_bias, dshift, dscale, dnorm_weight, dnorm_bias, dweight, dbias


def _add_partial(
    partial: Tensor | None,
    places: dict[str, int],
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the vectors, in their order, from the partial sums (B, chunks, sums, D)."""
    if partial is None:
        return (None,) * 6
    batch, chunks, _, width = partial.shape
    dgate, dshift, dscale = (None if v is None else adaln_triton._contiguous(v) for v in (gate, shift, scale))
    vectors = [v for v in (norm_weight, norm_bias, branch_bias) if v is not None]
    terms = partial.new_empty((batch, len(vectors), width)) if vectors else None
    _triton.launch(
        adaln_triton.add_chunks,
        batch * ceil_div(width, adaln_triton._COLUMNS),
        Tile(1, 4),
        partial.device,
        *(partial, chunks, gate, batch_stride(gate), scale, batch_stride(scale), branch_bias),
        *(norm_weight, norm_bias, dgate, dshift, dscale, terms),
        **places,
        D=width,
        COLUMNS=adaln_triton._COLUMNS,
    )
    sums = adaln_triton._add_samples(terms, vectors)
    dnorm_weight, dnorm_bias, dbranch_bias = (
        None if v is None else next(sums) for v in (norm_weight, norm_bias, branch_bias)
    )
    return dgate, dshift, dscale, dbranch_bias, dnorm_weight, dnorm_bias


def _weight_products(a: _Arguments, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Partial sums of dweight and dbias, where a patch has too many values for ``backward_columns`` to hold them."""
    batch, length, width = a.x.shape
    values = a.weight.shape[0]
    held, columns, tile = product_tile(values)
    blocks, groups, group_blocks = grouping(batch, length, values)
    partial = a.x.new_empty((groups, values * width), dtype=torch.float32)
    bias_partial = None if bias is None else a.x.new_empty((groups, values), dtype=torch.float32)
    _triton.launch(
        weight_products,
        groups * ceil_div(values, held) * ceil_div(width, columns),
        tile,
        a.x.device,
        *(a.dout, *a.dout.stride(), a.x, *strides(a.x), a.branch, *strides(a.branch)),
        *(a.gate, batch_stride(a.gate), a.shift, batch_stride(a.shift), a.scale, batch_stride(a.scale)),
        *(a.branch_bias, a.norm_weight, a.norm_bias, a.weight, a.mean, a.rstd, partial, bias_partial),
        *(length, blocks, batch * blocks, group_blocks, a.grid_w),
        D=width,
        V=values,
        P=a.patch_size,
        PRODUCT=product_dtype(a.dout, a.weight),
        VALUES=held,
        COLUMNS=columns,
        ROWS=tile.rows,
    )
    return partial, bias_partial


def _unpatchify(tokens: Tensor, grid_h: int, grid_w: int, patch_size: int) -> Tensor:
    batch, _, values = tokens.shape
    channels = values // (patch_size * patch_size)
    image = tokens.new_empty((batch, channels, grid_h * patch_size, grid_w * patch_size))
    parts = ceil_div(grid_w * values, _ELEMENTS)
    _triton.launch(
        place_values,
        batch * grid_h * parts,
        Tile(1, 4),
        tokens.device,
        *(tokens, *strides(tokens), image, grid_h, grid_w, parts),
        V=values,
        P=patch_size,
        ELEMENTS=_ELEMENTS,
    )
    return image


def _unpatchify_backward(dout: Tensor, patch_size: int) -> Tensor:
    batch, channels, height, width = dout.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    values = patch_size * patch_size * channels
    tokens = dout.new_empty((batch, grid_h * grid_w, values))
    parts = ceil_div(grid_w * values, _ELEMENTS)
    _triton.launch(
        gather_values,
        batch * grid_h * parts,
        Tile(1, 4),
        dout.device,
        *(dout, *dout.stride(), tokens, grid_h, grid_w, parts),
        V=values,
        P=patch_size,
        ELEMENTS=_ELEMENTS,
    )
    return tokens


# ------------------------------------------------------------------------------------------------------------------
# Registration
# ------------------------------------------------------------------------------------------------------------------


def _refuse_row(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    given = [a for a in args if isinstance(a, (Tensor, torch.dtype))]
    reason = _triton.refuse(x.shape[-1], x, weight, *given)
    if reason is None and x.shape[-1] > MAX_WIDTH:
        return f"a row of {x.shape[-1]} channels does not fit in registers; the widest taken is {MAX_WIDTH}"
    if reason is None and weight.shape[0] == 0:
        return "the linear has no outputs"
    return reason


def _refuse_final_layer(*args: Any) -> str | None:
    return _refuse_row(args[0], args[8], *args)


def _refuse_final_layer_backward(*args: Any) -> str | None:
    return _refuse_row(args[2], args[10], *args)


def _refuse_moving(values: Tensor, *args: Any) -> str | None:
    return _triton.refuse(1, values)


for _op, _kernel, _refuse in (
    (FINAL_LAYER, _final_layer, _refuse_final_layer),
    (FINAL_LAYER_BACKWARD, _final_layer_backward, _refuse_final_layer_backward),
    (UNPATCHIFY, _unpatchify, _refuse_moving),
    (UNPATCHIFY_BACKWARD, _unpatchify_backward, _refuse_moving),
):
    registry.implement(_op, "triton", _kernel, refuse=_refuse)
