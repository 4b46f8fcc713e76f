"""The Triton kernels of ``final_layer``. Names and formulas are those at the top of final_layer.py.

An absent argument (branch, gate, scale ...) is None and its code is not compiled. V = p·p·O, the values of a patch.

    forward_rows     a program owns ``ROWS`` tokens of one sample. Reads x (and the branch) once, writes the image, and mean
                     and rstd of each row (B, N), fp32: 1 pass (2 with a branch).
    forward_wide_rows  the same for rows of more than 4096 channels, which do not fit in registers: it walks over them once for
                     the mean, once for the variance and once for every 64 values.

    value_sums       a program owns ``VALUES`` values of one sample: reads W, writes slope and offset (B, V), fp32.

    row_means        a program owns ``ROWS`` tokens of one sample. Gathers dz and z from dout and out; writes the means of dx̂ and
                     dx̂·x̂ along each row (B, N), fp32. No (B, N, D) tensor is read.

    backward_columns a program owns ``COLUMNS`` channels and one group of chunks, a chunk being consecutive tokens of a sample.
                     Reads x (and the branch), writes dx (and dbranch): 2 passes (4), those of the whole backward. Adds up the
                     sums P, Q, R, S of adaln.py over each chunk; those that are needed go to partial sums
                     (B, chunks, sums, D), fp32, which ``add_chunks`` and ``add_samples`` of _rows_triton.py bring together.
                     For V <= 128 it adds up dW and dbias too, in partial sums (groups, V, D) and (groups, V), fp32, which
                     patch_embed_triton.py's ``add_groups`` brings together.

    weight_products  dW and dbias for V > 128, in the same kind of partial sums: a program owns ``COLUMNS`` channels and a group of
                     consecutive tokens. Reads x (and the branch) once more for every 256 values.

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
from ditkernels.ops import _triton
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
from ditkernels.ops._triton import Tile, ceil_div, jit, packed, per_sample, tl, with_strides
from ditkernels.ops.final_layer import FINAL_LAYER, FINAL_LAYER_BACKWARD
from ditkernels.ops.patch_embed_triton import product_dtype, sum_groups, value_tile
from ditkernels.ops.unpatchify_triton import places_of, values_of

# ------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------


@jit
def _weight_tile(weight, values, columns, V: tl.constexpr, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``values`` (.., 1) and channels ``columns`` (1, ..) of the weight, zero outside."""
    at = weight[0] + values.to(tl.int64) * weight[1] + columns * weight[2]
    return tl.load(at, mask_of(values < V, columns, END, D), 0.0)


@jit
def _add_product(  # type: ignore[no-untyped-def]
    z, h, weight, places, columns, V: tl.constexpr, END: tl.constexpr, D: tl.constexpr, PRODUCT: tl.constexpr
):
    """z plus the product of one piece of the rounded h with the weight."""
    w = _weight_tile(weight, places[:, None], columns, V, END, D)
    return tl.dot(h, tl.trans(w).to(PRODUCT), z, input_precision="ieee")


@jit
def _store_values(  # type: ignore[no-untyped-def]
    z, bias, out, sample, tokens, places, grid_w, live, V: tl.constexpr, P: tl.constexpr
):
    values = places[None, :]
    if bias is not None:
        z += tl.load(bias + values, values < V, 0.0).to(tl.float32)
    at = places_of(out, sample, tokens, values, grid_w, V, P)
    tl.store(at, z.to(out[0].dtype.element_ty), live & (values < V))


@jit
def forward_rows(  # type: ignore[no-untyped-def]
    x,
    branch,
    gate,
    branch_bias,
    shift,
    scale,
    norm_weight,
    norm_bias,
    weight,
    bias,
    out,
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
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    PIECES: tl.constexpr = (D + PIECE - 1) // PIECE
    sample = (program // blocks).to(tl.int64)
    tokens = (program % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    live = tokens < N
    line = sample * N + tokens
    x = rows_of(x, sample, tokens.to(tl.int64))
    branch = rows_of(branch, sample, tokens.to(tl.int64)) if branch is not None else None
    gate = of_sample(gate, sample) if gate is not None else None
    shift = of_sample(shift, sample) if shift is not None else None
    scale = of_sample(scale, sample) if scale is not None else None

    # Sums along a row are kept per column of a piece to the end, so that warps meet once and not at every piece.
    stream = ()
    sums = tl.zeros([ROWS, PIECE], tl.float32)
    for i in tl.static_range(PIECES):
        columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
        mask = mask_of(live, columns, (i + 1) * PIECE, D)
        u = load_piece(branch, columns, mask) if branch is not None else None
        piece = stream_piece(x, u, gate, branch_bias, columns, mask, (i + 1) * PIECE, D)
        sums += piece
        stream = stream + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    if mean is not None:
        mu = tl.div_rn(tl.sum(sums, 1, keep_dims=True), D * 1.0)
        tl.store(mean + line, mu, live)
    else:
        mu = tl.zeros([ROWS, 1], tl.float32)

    squares = tl.zeros([ROWS, PIECE], tl.float32)
    for i in tl.static_range(PIECES):
        columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
        difference = centred(stream[i], mu, columns, (i + 1) * PIECE, D)
        squares += difference * difference
    scaling = tl.rsqrt(tl.div_rn(tl.sum(squares, 1, keep_dims=True), D * 1.0) + eps)
    tl.store(rstd + line, scaling, live)

    hidden = ()
    for i in tl.static_range(PIECES):
        columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
        normed = (stream[i] - mu) * scaling
        h = modulated(normed, shift, scale, norm_weight, norm_bias, columns, (i + 1) * PIECE, D)
        hidden = hidden + (h.to(weight[0].dtype.element_ty).to(PRODUCT),)  # type: ignore[assignment]  # noqa: RUF005

    for first in range(0, V, VALUES):
        places = first + tl.arange(0, VALUES)
        z = tl.zeros([ROWS, VALUES], tl.float32)
        for i in tl.static_range(PIECES):
            columns = (i * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]
            z = _add_product(z, hidden[i], weight, places, columns, V, (i + 1) * PIECE, D, PRODUCT)
        _store_values(z, bias, out, sample, tokens, places, grid_w, live, V, P)


@jit
def forward_wide_rows(  # type: ignore[no-untyped-def]
    x,
    branch,
    gate,
    branch_bias,
    shift,
    scale,
    norm_weight,
    norm_bias,
    weight,
    bias,
    out,
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
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    ROUND: tl.constexpr = (D + PIECE - 1) // PIECE * PIECE
    sample = (program // blocks).to(tl.int64)
    tokens = (program % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    live = tokens < N
    line = sample * N + tokens
    x = rows_of(x, sample, tokens.to(tl.int64))
    branch = rows_of(branch, sample, tokens.to(tl.int64)) if branch is not None else None
    gate = of_sample(gate, sample) if gate is not None else None
    shift = of_sample(shift, sample) if shift is not None else None
    scale = of_sample(scale, sample) if scale is not None else None

    mu = tl.zeros([ROWS, 1], tl.float32)
    if mean is not None:
        sums = tl.zeros([ROWS, PIECE], tl.float32)
        for start in range(0, D, PIECE):
            columns = (start + tl.arange(0, PIECE)).to(tl.int64)[None, :]
            mask = mask_of(live, columns, ROUND, D)
            u = load_piece(branch, columns, mask) if branch is not None else None
            sums += stream_piece(x, u, gate, branch_bias, columns, mask, ROUND, D)
        mu = tl.div_rn(tl.sum(sums, 1, keep_dims=True), D * 1.0)
        tl.store(mean + line, mu, live)

    squares = tl.zeros([ROWS, PIECE], tl.float32)
    for start in range(0, D, PIECE):
        columns = (start + tl.arange(0, PIECE)).to(tl.int64)[None, :]
        mask = mask_of(live, columns, ROUND, D)
        u = load_piece(branch, columns, mask) if branch is not None else None
        piece = stream_piece(x, u, gate, branch_bias, columns, mask, ROUND, D)
        difference = centred(piece, mu, columns, ROUND, D)
        squares += difference * difference
    scaling = tl.rsqrt(tl.div_rn(tl.sum(squares, 1, keep_dims=True), D * 1.0) + eps)
    tl.store(rstd + line, scaling, live)

    for first in range(0, V, VALUES):
        places = first + tl.arange(0, VALUES)
        z = tl.zeros([ROWS, VALUES], tl.float32)
        for start in range(0, D, PIECE):
            columns = (start + tl.arange(0, PIECE)).to(tl.int64)[None, :]
            mask = mask_of(live, columns, ROUND, D)
            u = load_piece(branch, columns, mask) if branch is not None else None
            normed = (stream_piece(x, u, gate, branch_bias, columns, mask, ROUND, D) - mu) * scaling
            h = modulated(normed, shift, scale, norm_weight, norm_bias, columns, ROUND, D)
            h = h.to(weight[0].dtype.element_ty).to(PRODUCT)
            z = _add_product(z, h, weight, places, columns, V, ROUND, D, PRODUCT)
        _store_values(z, bias, out, sample, tokens, places, grid_w, live, V, P)


@jit
def value_sums(  # type: ignore[no-untyped-def]
    shift,
    scale,
    norm_weight,
    norm_bias,
    weight,
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
    shift = of_sample(shift, sample) if shift is not None else None
    scale = of_sample(scale, sample) if scale is not None else None

    slope = tl.zeros([VALUES, COLUMNS], tl.float32)
    offset = tl.zeros([VALUES, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        w = _weight_tile(weight, values, columns, V, ROUND, D).to(tl.float32)
        if slopes is not None:
            slope += w * slope_of(scale, norm_weight, columns, ROUND, D)
        origin = tl.zeros([1, COLUMNS], tl.float32)
        offset += w * modulated(origin, shift, scale, None, norm_bias, columns, ROUND, D)
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
    out,
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

    dnormeds = tl.zeros([ROWS, VALUES], tl.float32)
    products = tl.zeros([ROWS, VALUES], tl.float32)
    for first in range(0, V, VALUES):
        values = first + tl.arange(0, VALUES)[None, :]
        dz = values_of(dout, sample, tokens, values, grid_w, live, V, P).to(tl.float32)
        z = values_of(out, sample, tokens, values, grid_w, live, V, P).to(tl.float32)
        products += dz * (z - tl.load(offsets + sample * V + values, values < V, 0.0))
        if slopes is not None:
            dnormeds += dz * tl.load(slopes + sample * V + values, values < V, 0.0)
    tl.store(mean_product + line, tl.div_rn(tl.sum(products, 1, keep_dims=True), D * 1.0), live)
    if mean_dnormed is not None:
        tl.store(mean_dnormed + line, tl.div_rn(tl.sum(dnormeds, 1, keep_dims=True), D * 1.0), live)


@jit
def _normed(  # type: ignore[no-untyped-def]
    x, u, gate, branch_bias, mean, scaling, line, live, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    """One piece of x̂ again; outside the row it is not zero, but there dz or the weight is."""
    value = stream_piece(x, u, gate, branch_bias, columns, mask, END, D)
    if mean is not None:
        value -= tl.load(mean + line, live, 0.0)
    return value * scaling


@jit
def _dh(  # type: ignore[no-untyped-def]
    dout,
    weight,
    sample,
    tokens,
    columns,
    grid_w,
    live,
    END: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One piece of dh = Wᵀ·dz in fp32."""
    dh = tl.zeros([tokens.shape[0], columns.shape[1]], tl.float32)
    for first in range(0, V, VALUES):
        places = first + tl.arange(0, VALUES)
        dz = values_of(dout, sample, tokens, places[None, :], grid_w, live, V, P)
        w = _weight_tile(weight, places[:, None], columns, V, END, D)
        dh = tl.dot(dz.to(PRODUCT), w.to(PRODUCT), dh, input_precision="ieee")
    return dh


@jit
def _store_weight_sums(  # type: ignore[no-untyped-def]
    weight_partial,
    bias_partial,
    dw,
    db,
    group,
    column_tile,
    places,
    columns,
    V: tl.constexpr,
    END: tl.constexpr,
    D: tl.constexpr,
):
    lines = group.to(tl.int64) * V + places
    at = weight_partial + lines[:, None] * D + columns
    tl.store(at, dw, mask_of((places < V)[:, None], columns, END, D))
    if bias_partial is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if column_tile == 0:
            tl.store(bias_partial + lines, db, places < V)


@jit
def backward_columns(  # type: ignore[no-untyped-def]
    dout,
    x,
    branch,
    gate,
    branch_bias,
    shift,
    scale,
    norm_weight,
    norm_bias,
    weight,
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
    columns = (program % tiles * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = mask_of(columns >= 0, columns, ROUND, D)
    group = program // tiles
    places = tl.arange(0, HELD)

    dw = tl.zeros([HELD, COLUMNS], tl.float32)
    db = tl.zeros([HELD], tl.float32)
    start = group * group_chunks
    for chunk in range(start, tl.minimum(start + group_chunks, all_chunks)):
        sample = (chunk // chunks).to(tl.int64)
        first = (chunk % chunks) * chunk_rows
        last = tl.minimum(first + chunk_rows, N)
        own_gate = of_sample(gate, sample) if gate is not None else None
        own_shift = of_sample(shift, sample) if shift is not None else None
        own_scale = of_sample(scale, sample) if scale is not None else None
        p = tl.zeros([1, COLUMNS], tl.float32)
        q = tl.zeros([1, COLUMNS], tl.float32)
        r = tl.zeros([1, COLUMNS], tl.float32)
        s = tl.zeros([1, COLUMNS], tl.float32)
        for block in range(first, last, ROWS):
            tokens = block + tl.arange(0, ROWS)[:, None]
            live = tokens < last
            line = sample * N + tokens
            mask = mask_of(live, columns, ROUND, D)
            x_rows = rows_of(x, sample, tokens.to(tl.int64))
            branch_rows = rows_of(branch, sample, tokens.to(tl.int64)) if branch is not None else None
            u = load_piece(branch_rows, columns, mask) if branch is not None else None
            scaling = tl.load(rstd + line, live, 0.0)
            normed = _normed(
                x_rows, u, own_gate, branch_bias, mean, scaling, line, live, columns, mask, ROUND, D
            )
            dh = _dh(dout, weight, sample, tokens, columns, grid_w, live, ROUND, D, V, P, PRODUCT, VALUES)
            if SUM_P >= 0:
                p += over_rows(dh)
            if SUM_Q >= 0:
                q += over_rows(dh * normed)
            if weight_partial is not None:
                h = modulated(normed, own_shift, own_scale, norm_weight, norm_bias, columns, ROUND, D)
                h = h.to(weight[0].dtype.element_ty).to(PRODUCT)
                dz = values_of(dout, sample, tokens, places[None, :], grid_w, live, V, P)
                dw = tl.dot(tl.trans(dz).to(PRODUCT), h, dw, input_precision="ieee")
                if bias_partial is not None:
                    db += tl.sum(dz.to(tl.float32), 0)
            along_mean = tl.load(mean_dnormed + line, live, 0.0) if mean is not None else None
            dnormed = dh * slope_of(own_scale, norm_weight, columns, ROUND, D)
            d = through_norm(dnormed, normed, scaling, along_mean, tl.load(mean_product + line, live, 0.0))
            tl.store(dx + line * D + columns, d.to(dx.dtype.element_ty), mask)
            if dbranch is not None:
                through_gate = d * channels_of(own_gate, columns, ROUND, D)
                tl.store(dbranch + line * D + columns, through_gate.to(dbranch.dtype.element_ty), mask)
                r += over_rows(d * u.to(tl.float32))  # type: ignore[union-attr]
            if SUM_S >= 0:
                s += over_rows(d)

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
        _store_weight_sums(
            weight_partial, bias_partial, dw, db, group, program % tiles, places, columns, V, ROUND, D
        )


@jit
def weight_products(  # type: ignore[no-untyped-def]
    dout,
    x,
    branch,
    gate,
    branch_bias,
    shift,
    scale,
    norm_weight,
    norm_bias,
    weight,
    mean,
    rstd,
    weight_partial,
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
    columns = (program % tiles * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    places = program // tiles % value_tiles * VALUES + tl.arange(0, VALUES)
    group = program // (tiles * value_tiles)

    dw = tl.zeros([VALUES, COLUMNS], tl.float32)
    db = tl.zeros([VALUES], tl.float32)
    start = group * group_blocks
    for block in range(start, tl.minimum(start + group_blocks, all_blocks)):
        sample = (block // blocks).to(tl.int64)
        tokens = (block % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
        live = tokens < N
        line = sample * N + tokens
        mask = mask_of(live, columns, ROUND, D)
        x_rows = rows_of(x, sample, tokens.to(tl.int64))
        branch_rows = rows_of(branch, sample, tokens.to(tl.int64)) if branch is not None else None
        u = load_piece(branch_rows, columns, mask) if branch is not None else None
        own_gate = of_sample(gate, sample) if gate is not None else None
        own_shift = of_sample(shift, sample) if shift is not None else None
        own_scale = of_sample(scale, sample) if scale is not None else None
        scaling = tl.load(rstd + line, live, 0.0)
        normed = _normed(x_rows, u, own_gate, branch_bias, mean, scaling, line, live, columns, mask, ROUND, D)
        h = modulated(normed, own_shift, own_scale, norm_weight, norm_bias, columns, ROUND, D)
        h = h.to(weight[0].dtype.element_ty).to(PRODUCT)
        dz = values_of(dout, sample, tokens, places[None, :], grid_w, live, V, P)
        dw = tl.dot(tl.trans(dz).to(PRODUCT), h, dw, input_precision="ieee")
        if bias_partial is not None:
            db += tl.sum(dz.to(tl.float32), 0)

    _store_weight_sums(
        weight_partial, bias_partial, dw, db, group, program % tiles, places, columns, V, ROUND, D
    )


# ------------------------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------------------------

_WIDEST_HELD = 4096
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
_WIDE = Tile(16, 8)
_MERGED = 128  # values of a patch whose dW fits beside the rest in the registers


def row_piece(width: int, product: Any) -> int:
    """Channels of a piece: as few as keeps the number of pieces small enough to be written out."""
    narrowest = max(16, 1 << (min(width, _WIDEST_HELD) - 1).bit_length())
    usual = _PIECE // 2 if product == tl.float32 else _PIECE
    return min(narrowest, max(usual, narrowest // _MOST_PIECES))


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
    chunks, chunk_rows = chunking(batch, length, _PRODUCT_ROWS)
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
    mean, rstd = statistics(x, norm)
    vectors = Vectors.packed(gate, shift, scale, branch_bias, norm_weight, norm_bias)
    held = width <= _WIDEST_HELD
    tile = row_tile(width) if held else _WIDE
    product = product_dtype(weight)
    blocks = ceil_div(length, tile.rows)
    _triton.launch(
        forward_rows if held else forward_wide_rows,
        batch * blocks,
        tile,
        x.device,
        **_row_arguments(x, branch, vectors, weight),
        bias=packed(bias),
        out=with_strides(image),
        mean=mean,
        rstd=rstd,
        N=length,
        blocks=blocks,
        grid_w=grid_w,
        eps=eps,
        D=width,
        V=values,
        P=patch_size,
        PRODUCT=product,
        PIECE=row_piece(width, product),
        VALUES=value_tile(values, 32 if product == tl.float32 else 64),
        ROWS=tile.rows,
    )
    return image, or_empty(mean, x, torch.float32), rstd


def _row_arguments(x: Tensor, branch: Tensor | None, vectors: Vectors, weight: Tensor) -> dict[str, Any]:
    """What every kernel takes that makes h."""
    return {
        "x": with_strides(x),
        "branch": with_strides(branch),
        "gate": per_sample(vectors.gate),
        "branch_bias": vectors.branch_bias,
        "shift": per_sample(vectors.shift),
        "scale": per_sample(vectors.scale),
        "norm_weight": vectors.weight,
        "norm_bias": vectors.bias,
        "weight": with_strides(weight),
    }


class _Arguments(NamedTuple):
    """Of the backward."""

    dout: Tensor
    out: Tensor
    x: Tensor
    branch: Tensor | None
    vectors: Vectors
    weight: Tensor
    bias: Tensor | None
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
    vectors = Vectors.packed(gate, shift, scale, branch_bias, norm_weight, norm_bias)
    statistics = saved_statistics(mean, rstd, norm)
    a = _Arguments(dout, out, x, branch, vectors, weight, packed(bias), *statistics, grid_w, patch_size)
    merged = weight.shape[0] <= _MERGED
    dx, dbranch, partial, *products = _walk(a, *_row_means(a), merged)
    sums = products if merged else _weight_products(a)
    dgate, dshift, dscale, dbranch_bias, dnorm_weight, dnorm_bias = vectors.gradients(partial)
    dweight, dbias = (
        None if part is None or like is None else sum_groups(part, like)
        for part, like in zip(sums, (weight, bias))
    )
    gradients = (dx, dbranch, dgate, dbranch_bias, dshift, dscale, dnorm_weight, dnorm_bias, dweight, dbias)
    return tuple(or_empty(g, x) for g in gradients)


def _row_means(a: _Arguments) -> tuple[Tensor | None, Tensor]:
    """The means of dx̂ and of dx̂·x̂ along each row, (B, N) in fp32; none of the first for rmsnorm."""
    batch, length, width = a.x.shape
    values = a.weight.shape[0]
    means = None if a.mean is None else torch.empty_like(a.rstd)
    product_means = torch.empty_like(a.rstd)
    offsets = a.rstd.new_empty(batch, values)
    slopes = None if a.mean is None else torch.empty_like(offsets)
    held = value_tile(values, _SUMMED.rows)
    vectors = a.vectors
    _triton.launch(
        value_sums,
        batch * ceil_div(values, held),
        _SUMMED,
        a.x.device,
        *(per_sample(vectors.shift), per_sample(vectors.scale), vectors.weight, vectors.bias),
        *(with_strides(a.weight), a.bias, slopes, offsets),
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
        *(with_strides(a.dout), with_strides(a.out), slopes, offsets, means, product_means),
        *(length, blocks, a.grid_w),
        D=width,
        V=values,
        P=a.patch_size,
        VALUES=held,
        ROWS=_MEANS.rows,
    )
    return means, product_means


def _weight_sums(a: _Arguments, groups: int) -> tuple[Tensor, Tensor | None]:
    """Buffers of the partial sums of dweight and dbias, fp32."""
    values, width = a.weight.shape
    weight_partial = a.x.new_empty((groups, values * width), dtype=torch.float32)
    bias_partial = None if a.bias is None else a.x.new_empty((groups, values), dtype=torch.float32)
    return weight_partial, bias_partial


def _walk(
    a: _Arguments, means: Tensor | None, product_means: Tensor, merged: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dbranch, and the partial sums of the vectors' gradients, of dweight and of dbias (these two if ``merged``)."""
    batch, length, width = a.x.shape
    values = a.weight.shape[0]
    product = product_dtype(a.dout, a.weight)
    held, columns, tile = column_tile(values)
    chunks, chunk_rows, groups, group_chunks = chunk_groups(batch, length, values)
    dx = contiguous(a.x)
    dbranch = None if a.branch is None or a.vectors.gate is None else contiguous(a.branch)
    partial = a.vectors.partial_sums(a.x, chunks)
    weight_partial, bias_partial = _weight_sums(a, groups) if merged else (None, None)
    _triton.launch(
        backward_columns,
        groups * ceil_div(width, columns),
        tile,
        a.x.device,
        **_row_arguments(a.x, a.branch, a.vectors, a.weight),
        dout=with_strides(a.dout),
        mean=a.mean,
        rstd=a.rstd,
        mean_dnormed=means,
        mean_product=product_means,
        dx=dx,
        dbranch=dbranch,
        partial=partial,
        weight_partial=weight_partial,
        bias_partial=bias_partial,
        N=length,
        chunks=chunks,
        chunk_rows=chunk_rows,
        all_chunks=batch * chunks,
        group_chunks=group_chunks,
        grid_w=a.grid_w,
        **a.vectors.sums(),
        D=width,
        V=values,
        P=a.patch_size,
        PRODUCT=product,
        VALUES=value_tile(values, _values_at_a_time(product)),
        HELD=held,
        COLUMNS=columns,
        ROWS=tile.rows,
    )
    return dx, dbranch, partial, weight_partial, bias_partial


def _weight_products(a: _Arguments) -> tuple[Tensor, Tensor | None]:
    """Partial sums of dweight and dbias, where a patch has too many values for ``backward_columns`` to hold them."""
    batch, length, width = a.x.shape
    values = a.weight.shape[0]
    held, columns, tile = product_tile(values)
    blocks, groups, group_blocks = grouping(batch, length, values)
    weight_partial, bias_partial = _weight_sums(a, groups)
    _triton.launch(
        weight_products,
        groups * ceil_div(values, held) * ceil_div(width, columns),
        tile,
        a.x.device,
        **_row_arguments(a.x, a.branch, a.vectors, a.weight),
        dout=with_strides(a.dout),
        mean=a.mean,
        rstd=a.rstd,
        weight_partial=weight_partial,
        bias_partial=bias_partial,
        N=length,
        blocks=blocks,
        all_blocks=batch * blocks,
        group_blocks=group_blocks,
        grid_w=a.grid_w,
        D=width,
        V=values,
        P=a.patch_size,
        PRODUCT=product_dtype(a.dout, a.weight),
        VALUES=held,
        COLUMNS=columns,
        ROWS=tile.rows,
    )
    return weight_partial, bias_partial


# ------------------------------------------------------------------------------------------------------------------
# Registration
# ------------------------------------------------------------------------------------------------------------------


def _refuse_row(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    if weight.shape[0] == 0:
        return "the linear has no outputs"
    given = [a for a in args if isinstance(a, (Tensor, torch.dtype))]
    return _triton.refuse(1, x, weight, *given)


def _refuse_final_layer(*args: Any) -> str | None:
    return _refuse_row(args[0], args[8], *args)


def _refuse_final_layer_backward(*args: Any) -> str | None:
    return _refuse_row(args[2], args[10], *args)


for _op, _kernel, _refuse in (
    (FINAL_LAYER, _final_layer, _refuse_final_layer),
    (FINAL_LAYER_BACKWARD, _final_layer_backward, _refuse_final_layer_backward),
):
    registry.implement(_op, "triton", _kernel, refuse=_refuse)
