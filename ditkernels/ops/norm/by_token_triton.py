"""The Triton kernels of the norm family with vectors of rows: norm/by_token.py says what they mean, norm/triton.py computes it.

    forward_rows_by_token    A program owns one token, whose row of the vectors it reads.
    backward_rows_by_token   A program owns one chunk of the tokens of one sample, walks through it, and writes the gradients of
                             each token's own vectors. It sums up what they are in already: dbias, dweight, dbranch_bias.
    backward_rows_by_index   A program owns one chunk of the tokens of one row of a sample, in their order, and sums as
                             ``backward_rows`` does for a sample. Rows of all samples are the samples of ``add_chunks``.

Passes beside those of the ops per sample: gate, shift and scale per token are read once in the forward, gate and scale in the
backward, and the gradients of gate and scale are written once. The number of a row's chunks depends on shapes alone; which tokens
they hold depends on the index.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._rows import contiguous, of_sample
from ditkernels.ops._triton import Tile, ceil_div, jit, packed, per_sample, pieces, tl, with_strides
from ditkernels.ops.norm.by_token import GATED_RESIDUAL_BY_TOKEN, GATED_RESIDUAL_NORM_BY_TOKEN, MODULATE_NORM_BY_TOKEN
from ditkernels.ops.norm.triton import (
    Constants,
    Dtypes,
    _dtype,
    _new,
    add_sums,
    backward_plan,
    chunking,
    norm_rows,
    rows_of_vector,
    walk,
)
from ditkernels.ops.spec import Wanted

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def forward_rows_by_token(  # type: ignore[no-untyped-def]
    x, x_b, x_n, x_d, branch, branch_b, branch_n, branch_d, gate, gate_b, gate_k, shift, shift_b, shift_k, scale, scale_b, scale_k,
    index, branch_bias, weight, bias, x1, h, stats, N, eps,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // N).to(tl.int64)
    token = (program % N).to(tl.int64)
    row = tl.load(index + sample * N + token) if index is not None else token
    gate = rows_of_vector((gate, gate_b, gate_k), sample, row) if gate is not None else None
    shift = rows_of_vector((shift, shift_b, shift_k), sample, row) if shift is not None else None
    scale = rows_of_vector((scale, scale_b, scale_k), sample, row) if scale is not None else None
    tokens = (x, x_b, x_n, x_d), (branch, branch_b, branch_n, branch_d)
    rows = token + tl.zeros([1, 1], tl.int64)
    norm_rows(tokens, gate, shift, scale, branch_bias, weight, bias, x1, h, stats, None, sample, rows, N, eps, D, S, HEAD, TAIL, 1)


@jit
def backward_rows_by_token(  # type: ignore[no-untyped-def]
    dx1, dx1_b, dx1_n, dx1_d, dh, dh_b, dh_n, dh_d, x1, x1_b, x1_n, x1_d, branch, branch_b, branch_n, branch_d,
    gate, gate_b, gate_k, scale, scale_b, scale_k, branch_bias, weight, bias, stats,
    dx, dbranch, partial, dgate, dshift, dscale, N, chunks, chunk_rows,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    ONE_WARP: tl.constexpr, OF_ROWS: tl.constexpr,
    SUM_P: tl.constexpr, SUM_Q: tl.constexpr, SUM_R: tl.constexpr, SUM_S: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    first = (program % chunks) * chunk_rows
    last = tl.minimum(first + chunk_rows, N)
    tokens = (dx1, dx1_b, dx1_n, dx1_d), (dh, dh_b, dh_n, dh_d), (x1, x1_b, x1_n, x1_d), (branch, branch_b, branch_n, branch_d)
    gate = gate, gate_b, gate_k
    scale = scale, scale_b, scale_k
    outs = dx, dbranch, partial, dgate, dshift, dscale
    walk(
        tokens, gate, scale, branch_bias, weight, bias, stats, None, outs, sample, None, first, last, N,
        D, S, HEAD, TAIL, ROWS, ONE_WARP, OF_ROWS, True, SUM_P, SUM_Q, SUM_R, SUM_S, SUMS,
    )  # fmt: skip


@jit
def backward_rows_by_index(  # type: ignore[no-untyped-def]
    dx1, dx1_b, dx1_n, dx1_d, dh, dh_b, dh_n, dh_d, x1, x1_b, x1_n, x1_d, branch, branch_b, branch_n, branch_d,
    gate, gate_b, scale, scale_b, weight, stats, dx, dbranch, partial, order, starts, N, K, chunks,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    ONE_WARP: tl.constexpr, OF_ROWS: tl.constexpr,
    SUM_P: tl.constexpr, SUM_Q: tl.constexpr, SUM_R: tl.constexpr, SUM_S: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = (program // chunks).to(tl.int64)
    sample = group // K
    starts += sample * (K + 1) + group % K
    begin = tl.load(starts).to(tl.int32)
    end = tl.load(starts + 1).to(tl.int32)
    share = (end - begin + chunks - 1) // chunks
    first = begin + (program % chunks) * share
    last = tl.minimum(first + share, end)
    tokens = (dx1, dx1_b, dx1_n, dx1_d), (dh, dh_b, dh_n, dh_d), (x1, x1_b, x1_n, x1_d), (branch, branch_b, branch_n, branch_d)
    gate = of_sample((gate, gate_b), group) if gate is not None else None
    scale = of_sample((scale, scale_b), group) if scale is not None else None
    outs = dx, dbranch, partial, None, None, None
    walk(
        tokens, gate, scale, None, weight, None, stats, None, outs, sample, order + sample * N, first, last, N,
        D, S, HEAD, TAIL, ROWS, ONE_WARP, OF_ROWS, False, SUM_P, SUM_Q, SUM_R, SUM_S, SUMS,
    )  # fmt: skip


# ---- Launch ----------------------------------------------------------------------------------------------------------


@functools.cache
def one_row(width: int) -> Tile:
    """One token at a time, about 256 channels a warp: its vectors take the registers of further rows."""
    head, _ = pieces(width)
    return Tile(1, max(1, min(32, head // 256)))


@functools.cache
def one_row_backward(width: int) -> Tile:
    """As ``one_row``, with all registers there are: where a token is found by its place in an order, its address takes some."""
    head, _ = pieces(width)
    return Tile(1, max(1, min(32, head // 256)), registers=255 if head <= 1024 else None)


def _of_rows(vector: Tensor | None) -> tuple[Any, ...]:
    """A (B, K, D) vector with contiguous channels, and the strides of samples and rows; three times None for None."""
    if vector is None:
        return None, None, None
    if vector.stride(2) != 1:
        vector = vector.contiguous()
    return vector, vector.stride(0), vector.stride(1)


def _flat(vector: Tensor | None) -> Tensor | None:
    """A (B, K, D) vector as (B·K, D)."""
    return None if vector is None else vector.flatten(0, 1)


@GATED_RESIDUAL_NORM_BY_TOKEN.implement("triton", refuse=_triton.refuse)
def gated_residual_norm_by_token(  # type: ignore[no-untyped-def]
    x, branch, gate, shift, scale, branch_bias, weight, bias, index, order, starts, norm, eps, out_dtype, keep
):
    """x1, h and stats. x1 is None without a branch, h without ``out_dtype``, stats without ``keep``."""
    device = x.device
    batch, length, width = x.shape
    head, tail = pieces(int(width))
    constants: Constants = {"D": int(width), "S": 1 if norm == "rmsnorm" else 2, "HEAD": head, "TAIL": tail}
    x1 = None if branch is None else contiguous(x)
    h = None if out_dtype is None else contiguous(x, out_dtype)
    stats = _new(torch.float32, device, batch, length, constants["S"]) if keep else None
    rows = (*with_strides(x), *with_strides(branch), *_of_rows(gate), *_of_rows(shift), *_of_rows(scale), packed(index))
    parameters = (packed(branch_bias), packed(weight), packed(bias))
    outs = (x1, h, stats, length, eps)
    _triton.launch(forward_rows_by_token, batch * length, one_row(int(width)), device, *rows, *parameters, *outs, **constants)
    return x1, h, stats


@MODULATE_NORM_BY_TOKEN.implement("triton", refuse=_triton.refuse)
def modulate_norm_by_token(  # type: ignore[no-untyped-def]
    x, shift, scale, weight, bias, index, order, starts, norm, eps, out_dtype, keep
):
    _, h, stats = gated_residual_norm_by_token(
        x, None, None, shift, scale, None, weight, bias, index, order, starts, norm, eps, out_dtype, keep
    )
    return h, stats


@GATED_RESIDUAL_BY_TOKEN.implement("triton", refuse=_triton.refuse)
def gated_residual_by_token(x, branch, gate, branch_bias, index, order, starts):  # type: ignore[no-untyped-def]
    nothing = (None, None, branch_bias, None, None)
    x1, _, _ = gated_residual_norm_by_token(x, branch, gate, *nothing, index, order, starts, "layernorm", 0.0, None, False)
    return x1


@functools.cache
def _own_plan(width: int, norm: str, wanted: Wanted, *dtypes: torch.dtype | None) -> tuple[Tile, Constants, Constants, Constants]:
    """As ``backward_plan`` where each token's own vectors need no sum: those of what all tokens share are left."""
    of_x, of_branch, of_gate, _, _, *of_shared = wanted
    _, rows, chunks, samples = backward_plan(width, norm, (of_x, of_branch, None, None, None, *of_shared), False, False, *dtypes)
    tile = one_row_backward(width)
    beyond = rows["OF_ROWS"] or of_gate is not None
    return tile, rows | {"ROWS": 1, "ONE_WARP": tile.warps == 1, "OF_ROWS": beyond}, chunks, samples


@GATED_RESIDUAL_NORM_BY_TOKEN.gradients.implement("triton", refuse=_triton.refuse)
def gated_residual_norm_by_token_backward(  # type: ignore[no-untyped-def]
    dx1, dh, x1, branch, gate, scale, branch_bias, weight, bias, stats, index, order, starts, norm, wanted
):
    """The wanted gradients, None for the others."""
    if index is not None:
        return _by_index(dx1, dh, x1, branch, gate, scale, branch_bias, weight, bias, stats, order, starts, norm, wanted)
    of_x, of_branch, of_gate, of_shift, of_scale, *_ = wanted
    like = dx1 if dh is None else dh
    device = like.device
    batch, length, width = like.shape
    branch = None if of_gate is None else branch
    dtypes: Dtypes = (_dtype(dx1), _dtype(dh), _dtype(x1), _dtype(branch))
    tile, constants, of_chunks, of_samples = _own_plan(int(width), norm, wanted, *dtypes)
    if not constants["OF_ROWS"]:
        dx1 = None
    chunks, chunk_rows = chunking(batch, length, 1)
    made = [None if dtype is None else contiguous(like, dtype) for dtype in (of_x, of_branch, of_gate, of_shift, of_scale)]
    dx, dbranch, *of_rows = made
    sums = constants["SUMS"]
    partial = _new(torch.float32, device, batch, chunks, sums, width) if sums else None
    rows = (*with_strides(dx1), *with_strides(dh), *with_strides(x1), *with_strides(branch))
    parameters = (packed(branch_bias), packed(weight), packed(bias), packed(stats))
    outs = (dx, dbranch, partial, *of_rows, length, chunks, chunk_rows)
    given = (*rows, *_of_rows(gate), *_of_rows(scale), *parameters, *outs)
    _triton.launch(backward_rows_by_token, batch * chunks, tile, device, *given, **constants)
    if partial is None:
        return *made, None, None, None
    absent = (None, None)
    shared = add_sums(partial, absent, absent, None, None, None, (None, None, None, *wanted[5:]), of_chunks, of_samples)
    return *made, *shared[3:]


def _by_index(  # type: ignore[no-untyped-def]
    dx1, dh, x1, branch, gate, scale, branch_bias, weight, bias, stats, order, starts, norm, wanted
):
    """The gradients where tokens take rows by an index, as those of samples: a row of a sample is one."""
    of_x, of_branch, of_gate, *_ = wanted
    like = dx1 if dh is None else dh
    device = like.device
    batch, length, width = like.shape
    if order is None or starts is None:
        raise RuntimeError("an index comes with order and starts")
    rows_of_sample = starts.shape[1] - 1
    branch = None if of_gate is None else branch
    _, constants, of_chunks, of_samples = backward_plan(
        *(int(width), norm, wanted, branch_bias is not None, bias is not None),
        *(_dtype(dx1), _dtype(dh), _dtype(x1), _dtype(branch)),
    )
    tile = one_row_backward(int(width))
    constants = constants | {"ROWS": 1, "ONE_WARP": tile.warps == 1}
    if not constants["OF_ROWS"]:
        dx1 = None
    groups, sums = batch * rows_of_sample, constants["SUMS"]
    # By shapes alone, as if all rows had as many tokens.
    chunks = chunking(groups, ceil_div(length, max(rows_of_sample, 1)), tile.rows)[0]
    dx = None if of_x is None else contiguous(like, of_x)
    dbranch = None if of_branch is None else contiguous(like, of_branch)
    partial = _new(torch.float32, device, groups, chunks, sums, width) if sums else None
    gate, scale = per_sample(_flat(gate)), per_sample(_flat(scale))
    rows = (*with_strides(dx1), *with_strides(dh), *with_strides(x1), *with_strides(branch))
    parameters = (*gate, *scale, packed(weight), packed(stats))
    outs = (dx, dbranch, partial, packed(order), packed(starts), length, rows_of_sample, chunks)
    _triton.launch(backward_rows_by_index, groups * chunks, tile, device, *rows, *parameters, *outs, **constants)
    if partial is None:
        return dx, dbranch, *[None] * 6
    vectors = add_sums(partial, gate, scale, branch_bias, weight, bias, wanted[2:], of_chunks, of_samples)
    own = [None if made is None else made.view(batch, rows_of_sample, width) for made in vectors[:3]]
    return dx, dbranch, *own, *vectors[3:]


@MODULATE_NORM_BY_TOKEN.gradients.implement("triton", refuse=_triton.refuse)
def modulate_norm_by_token_backward(  # type: ignore[no-untyped-def]
    dh, x, scale, weight, bias, stats, index, order, starts, norm, wanted
):
    of_x, of_shift, of_scale, of_weight, of_bias = wanted
    dx, _, _, dshift, dscale, _, dweight, dbias = gated_residual_norm_by_token_backward(
        *(None, dh, x, None, None, scale, None, weight, bias, stats, index, order, starts, norm),
        (of_x, None, None, of_shift, of_scale, None, of_weight, of_bias),
    )
    return dx, dshift, dscale, dweight, dbias


@GATED_RESIDUAL_BY_TOKEN.gradients.implement("triton", refuse=_triton.refuse)
def gated_residual_by_token_backward(  # type: ignore[no-untyped-def]
    dx1, branch, gate, branch_bias, index, order, starts, wanted
):
    of_branch, of_gate, of_bias = wanted
    _, dbranch, dgate, _, _, dbranch_bias, _, _ = gated_residual_norm_by_token_backward(
        *(dx1, None, None, branch, gate, None, branch_bias, None, None, None, index, order, starts, "layernorm"),
        (None, of_branch, of_gate, None, None, of_bias, None, None),
    )
    return dbranch, dgate, dbranch_bias
