"""The Triton kernels of the residual of a normed branch: norm/branch_norm.py says what they mean, norm/triton.py computes it.

    forward_rows_branch_norm    A program owns ``ROWS`` rows of one sample, and norms the branch's in registers.
                                gated_residual       reads x, branch      writes x1          3 passes
                                gated_residual_norm  reads x, branch      writes x1, h       4 passes
                                If ``keep`` is set, it also writes ``branch_stats`` (B, N, 1), fp32, beside ``stats``.

    backward_rows_branch_norm   A program owns one chunk of the tokens of one sample and walks through it.
                                gated_residual       reads dx1, branch           writes dbranch       3 passes
                                gated_residual_norm  reads dx1, dh, x1, branch   writes dx, dbranch   6 passes
                                T goes to the partial sums in the place of S, or without a weight of R, and ``add_chunks`` takes it
                                as it takes these. Where nothing of the branch is wanted, ``backward_rows`` runs.

The same inputs give the same bits: nothing is added atomically, and the number of chunks depends on shapes alone.
"""

from __future__ import annotations

import torch

from ditkernels.ops import _triton
from ditkernels.ops._rows import contiguous, of_sample
from ditkernels.ops._triton import ceil_div, jit, packed, per_sample, pieces, tl, with_strides
from ditkernels.ops.norm.branch_norm import GATED_RESIDUAL_BRANCH_NORM, GATED_RESIDUAL_NORM_BRANCH_NORM
from ditkernels.ops.norm.by_token_triton import one_row, one_row_backward
from ditkernels.ops.norm.triton import (
    Constants,
    _dtype,
    _new,
    add_sums,
    backward_plan,
    chunking,
    gated_residual_norm_backward,
    norm_rows,
    walk,
)

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def forward_rows_branch_norm(  # type: ignore[no-untyped-def]
    x, x_b, x_n, x_d, branch, branch_b, branch_n, branch_d, gate, gate_b, shift, shift_b, scale, scale_b,
    branch_weight, weight, bias, x1, h, stats, branch_stats, N, blocks, eps, branch_eps,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    rows = ((program % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    gate = of_sample((gate, gate_b), sample) if gate is not None else None
    shift = of_sample((shift, shift_b), sample) if shift is not None else None
    scale = of_sample((scale, scale_b), sample) if scale is not None else None
    tokens = (x, x_b, x_n, x_d), (branch, branch_b, branch_n, branch_d)
    branch_norm = branch_weight, branch_stats, branch_eps
    norm_rows(
        tokens, gate, shift, scale, None, weight, bias, x1, h, stats, branch_norm, sample, rows, N, eps, D, S, HEAD, TAIL, ROWS
    )


@jit
def backward_rows_branch_norm(  # type: ignore[no-untyped-def]
    dx1, dx1_b, dx1_n, dx1_d, dh, dh_b, dh_n, dh_d, x1, x1_b, x1_n, x1_d, branch, branch_b, branch_n, branch_d,
    gate, gate_b, scale, scale_b, branch_weight, weight, stats, branch_stats, dx, dbranch, partial, N, chunks, chunk_rows,
    D: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    ONE_WARP: tl.constexpr, OF_ROWS: tl.constexpr,
    SUM_P: tl.constexpr, SUM_Q: tl.constexpr, SUM_R: tl.constexpr, SUM_S: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    first = (program % chunks) * chunk_rows
    last = tl.minimum(first + chunk_rows, N)
    gate = of_sample((gate, gate_b), sample) if gate is not None else None
    scale = of_sample((scale, scale_b), sample) if scale is not None else None
    tokens = (dx1, dx1_b, dx1_n, dx1_d), (dh, dh_b, dh_n, dh_d), (x1, x1_b, x1_n, x1_d), (branch, branch_b, branch_n, branch_d)
    branch_norm = branch_weight, branch_stats
    outs = dx, dbranch, partial, None, None, None
    walk(
        tokens, gate, scale, None, weight, None, stats, branch_norm, outs, sample, None, first, last, N,
        D, S, HEAD, TAIL, ROWS, ONE_WARP, OF_ROWS, False, SUM_P, SUM_Q, SUM_R, SUM_S, SUMS,
    )  # fmt: skip


# ---- Launch ----------------------------------------------------------------------------------------------------------


@GATED_RESIDUAL_NORM_BRANCH_NORM.implement("triton", refuse=_triton.refuse)
def gated_residual_norm_branch_norm(  # type: ignore[no-untyped-def]
    x, branch, gate, shift, scale, branch_weight, weight, bias, branch_eps, norm, eps, out_dtype, keep
):
    """x1, h, stats and branch_stats. h is None without ``out_dtype``, and so is stats; both statistics without ``keep``."""
    device = x.device
    batch, length, width = x.shape
    tile = one_row(int(width))
    head, tail = pieces(int(width))
    columns = 1 if norm == "rmsnorm" else 2
    constants: Constants = {"D": int(width), "S": columns, "HEAD": head, "TAIL": tail, "ROWS": tile.rows}
    blocks = ceil_div(length, tile.rows)
    x1, h = contiguous(x), None if out_dtype is None else contiguous(x, out_dtype)
    stats = _new(torch.float32, device, batch, length, columns) if keep and out_dtype is not None else None
    branch_stats = _new(torch.float32, device, batch, length, 1) if keep else None
    rows = (*with_strides(x), *with_strides(branch))
    of_samples = (*per_sample(gate), *per_sample(shift), *per_sample(scale))
    parameters = (packed(branch_weight), packed(weight), packed(bias))
    outs = (x1, h, stats, branch_stats, length, blocks, eps, branch_eps)
    given = (*rows, *of_samples, *parameters, *outs)
    _triton.launch(forward_rows_branch_norm, batch * blocks, tile, device, *given, **constants)
    return x1, h, stats, branch_stats


@GATED_RESIDUAL_BRANCH_NORM.implement("triton", refuse=_triton.refuse)
def gated_residual_branch_norm(x, branch, gate, branch_weight, branch_eps, keep):  # type: ignore[no-untyped-def]
    x1, _, _, branch_stats = gated_residual_norm_branch_norm(
        x, branch, gate, None, None, branch_weight, None, None, branch_eps, "layernorm", 0.0, None, keep
    )
    return x1, branch_stats


@GATED_RESIDUAL_NORM_BRANCH_NORM.gradients.implement("triton", refuse=_triton.refuse)
def gated_residual_norm_branch_norm_backward(  # type: ignore[no-untyped-def]
    dx1, dh, x1, branch, gate, scale, branch_weight, weight, bias, stats, branch_stats, norm, wanted
):
    """The wanted gradients, None for the others."""
    of_x, of_branch, of_gate, *_ = wanted
    if not (of_branch or of_gate or wanted[5]):
        return gated_residual_norm_backward(dx1, dh, x1, None, None, scale, None, weight, bias, stats, norm, wanted)
    like = dx1 if dh is None else dh
    device = like.device
    batch, length, width = like.shape
    dtypes = (_dtype(dx1), _dtype(dh), _dtype(x1), _dtype(branch))
    has_weight, has_bias = branch_weight is not None, bias is not None
    _, constants, of_chunks, of_samples = backward_plan(int(width), norm, wanted, has_weight, has_bias, *dtypes, branch_norm=True)
    tile = one_row_backward(int(width))
    constants = constants | {"ROWS": tile.rows, "ONE_WARP": tile.warps == 1}
    sums = constants["SUMS"]
    chunks, chunk_rows = chunking(batch, length, tile.rows)
    dx = None if of_x is None else contiguous(like, of_x)
    dbranch = None if of_branch is None else contiguous(like, of_branch)
    partial = _new(torch.float32, device, batch, chunks, sums, width) if sums else None
    rows = (*with_strides(dx1), *with_strides(dh), *with_strides(x1), *with_strides(branch))
    gate, scale = per_sample(gate), per_sample(scale)
    parameters = (packed(branch_weight), packed(weight), packed(stats), packed(branch_stats))
    outs = (dx, dbranch, partial, length, chunks, chunk_rows)
    given = (*rows, *gate, *scale, *parameters, *outs)
    _triton.launch(backward_rows_branch_norm, batch * chunks, tile, device, *given, **constants)
    if partial is None:
        return dx, dbranch, None, None, None, None, None, None
    return dx, dbranch, *add_sums(partial, gate, scale, branch_weight, weight, bias, wanted[2:], of_chunks, of_samples)


@GATED_RESIDUAL_BRANCH_NORM.gradients.implement("triton", refuse=_triton.refuse)
def gated_residual_branch_norm_backward(  # type: ignore[no-untyped-def]
    dx1, branch, gate, branch_weight, branch_stats, wanted
):
    of_branch, of_gate, of_weight = wanted
    _, dbranch, dgate, _, _, dweight, _, _ = gated_residual_norm_branch_norm_backward(
        *(dx1, None, None, branch, gate, None, branch_weight, None, None, None, branch_stats, "layernorm"),
        (None, of_branch, of_gate, None, None, of_weight, None, None),
    )
    return dbranch, dgate, dweight
