"""Norm, modulation and gated residual: ``modulate_norm``, ``gated_residual``, ``gated_residual_norm``.

gate, shift and scale are those of a sample here. ``vectors.py`` says how others are seen so, ``by_token.py`` has those of a token.
``branch_norm.py`` has the residual of a branch that is normed first.

Forward, for token n of sample b, over channels d (all arithmetic of compiled kernels is in fp32):

    u  = branch + branch_bias                       x1 = x + gate_b · u
    x̂  = (x1 - mean) · rstd        layernorm: mean over d, rstd = (var + eps)^-1/2
                                   rmsnorm:   mean = 0,    rstd = (mean of squares + eps)^-1/2
    h  = (x̂ · weight + bias) · (1 + scale_b) + shift_b

A constant row has x̂ = 0 exactly (NaN where eps is 0). In compiled kernels a row whose variance overflows is NaN.

Backward, from dx1 (the gradient of the stream) and dh, with a = (1 + scale_b) · weight:

    dx̂ = dh · a
    dx = dx1 + rstd · (dx̂ - mean_d(dx̂) - x̂ · mean_d(dx̂ · x̂))         (rmsnorm: without mean_d(dx̂))
    dbranch = gate_b · dx

and everything else from four sums over the tokens of a sample,

    P = Σ_n dh    Q = Σ_n dh · x̂    R = Σ_n dx · branch    S = Σ_n dx :

    dshift = P    dscale = weight · Q + bias · P    dweight = Σ_b (1 + scale_b) · Q    dbias = Σ_b (1 + scale_b) · P
    dgate = R + branch_bias · S                     dbranch_bias = Σ_b gate_b · S

Saved for backward, as far as the wanted gradients need it: the stream x1 (for ``modulate_norm`` its input), the branch, the
vectors, and ``stats``, mean and rstd of each row in fp32 (rmsnorm: rstd alone). The branch is saved because it cannot be
recovered where the gate is zero, which is how adaLN-Zero starts.

Layer norm: Ba et al. 2016 (arXiv 1607.06450); RMS norm: Zhang & Sennrich 2019 (arXiv 1910.07467); adaLN-Zero: arXiv 2212.09748.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import _native
from ditkernels.ops.dispatch import Whole, declare, is_plain
from ditkernels.ops.norm import by_token  # noqa: F401 (it declares ops that ``wider`` finds by name)
from ditkernels.ops.norm.branch_norm import (
    GATED_RESIDUAL_BRANCH_NORM,
    GATED_RESIDUAL_NORM_BRANCH_NORM,
    check_branch_norm,
    normed_apart,
)
from ditkernels.ops.norm.formulas import in_dtype, norm_formula, normed_rows, offset_gradients, through_norm, vector_gradients
from ditkernels.ops.norm.vectors import by_index, wider
from ditkernels.ops.spec import Example, Given, Gradient, Sizes, Wanted, accumulator, check_norm

__all__ = ["gated_residual", "gated_residual_norm", "modulate_norm"]

# ---- Public functions ------------------------------------------------------------------------------------------------


def modulate_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x)·(1 + scale) + shift, in one pass over x.

    Args:
        x: (B, N, D), any strides.
        shift, scale: each optional, and each (D,), shared by the batch; (B, D), per sample; (B, S, D), per segment of N/S tokens;
            or (B, N, D), per token.
        index: (B, N), int64 or int32. Token n of sample b then takes row index[b, n] of a (K, D) vector, and row (b, index[b, n])
            of a (B, K, D) one. A value outside 0..K-1 is refused here on a CPU, and by an assertion on the device on a GPU.
        weight, bias: (D,), the norm's own affine parameters, each optional.
        norm: "layernorm" or "rmsnorm".
        eps: added to the variance (layernorm) or to the mean square (rmsnorm).
        out_dtype: of the result; by default autocast's dtype where autocast is on, else x's.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own. Compiled kernels compute in fp32;
    the ``torch`` backend rounds where plain PyTorch does.

    Returns:
        (B, N, D).

    Raises:
        ValueError, TypeError: a shape, dtype, device or kind of tensor that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    out_dtype = out_dtype or MODULATE_NORM.autocast_dtype(x) or x.dtype
    if index is not None:
        return by_index(MODULATE_NORM, (x, shift, scale, weight, bias), (norm, eps, out_dtype), index)  # type: ignore[no-any-return]
    return MODULATE_NORM((x, shift, scale, weight, bias), (norm, eps, out_dtype))  # type: ignore[no-any-return]


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    *,
    index: Tensor | None = None,
    branch_bias: Tensor | None = None,
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    branch_eps: float = 1e-6,
) -> Tensor:
    """x + gate·(branch + branch_bias), in x's dtype; with a ``branch_norm`` x + gate·(norm(branch)·branch_weight).

    Args:
        x, branch: (B, N, D), any strides, dtypes independent of each other.
        gate: (B, D), or as ``shift`` in ``modulate_norm``, or None for an ungated residual. A tanh of it is the caller's.
        index: as in ``modulate_norm``.
        branch_bias: (D,), the bias of the linear that made the branch, if that linear left it to this op.
        branch_norm: "rmsnorm" norms the branch before gate and residual, in the same passes. A branch_bias does not go with it.
        branch_weight: (D,), that norm's own weight.
        branch_eps: added to the mean square of the branch.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        As ``modulate_norm``.
    """
    if branch_norm is not None or branch_weight is not None:
        check_branch_norm(branch_norm, branch_weight, branch_bias)
        if index is None:
            return GATED_RESIDUAL_BRANCH_NORM((x, branch, gate, branch_weight), (branch_eps,))  # type: ignore[no-any-return]
        branch = normed_apart(branch, branch_weight, branch_eps)
    if index is not None:
        return by_index(GATED_RESIDUAL, (x, branch, gate, branch_bias), (), index)  # type: ignore[no-any-return]
    return GATED_RESIDUAL((x, branch, gate, branch_bias))  # type: ignore[no-any-return]


def gated_residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, shift: Tensor | None = None,
    scale: Tensor | None = None, *, index: Tensor | None = None, branch_bias: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, norm: str = "layernorm", eps: float = 1e-6,
    out_dtype: torch.dtype | None = None, branch_norm: str | None = None, branch_weight: Tensor | None = None,
    branch_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x1 = x + gate·(branch + branch_bias) and h = norm(x1)·(1 + scale) + shift, in one pass.

    Arguments as in ``gated_residual`` and ``modulate_norm``; ``out_dtype`` is h's.

    Returns:
        (x1, h), both (B, N, D): x1 in x's dtype; h is the norm of x1 as stored, so that backward sees the same rows.

    Raises:
        As ``modulate_norm``.
    """
    out_dtype = out_dtype or GATED_RESIDUAL_NORM.autocast_dtype(x) or x.dtype
    if branch_norm is not None or branch_weight is not None:
        check_branch_norm(branch_norm, branch_weight, branch_bias)
        if index is None:
            given = (x, branch, gate, shift, scale, branch_weight, weight, bias)
            return GATED_RESIDUAL_NORM_BRANCH_NORM(given, (branch_eps, norm, eps, out_dtype))  # type: ignore[no-any-return]
        branch = normed_apart(branch, branch_weight, branch_eps)
    tensors = (x, branch, gate, shift, scale, branch_bias, weight, bias)
    if index is not None:
        return by_index(GATED_RESIDUAL_NORM, tensors, (norm, eps, out_dtype), index)  # type: ignore[no-any-return]
    return GATED_RESIDUAL_NORM(tensors, (norm, eps, out_dtype))  # type: ignore[no-any-return]


# ---- Gradients: what the backward ops leave to plain PyTorch ---------------------------------------------------------


def _norm_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    (dh,) = grads
    x, scale, *_ = read
    if x is None:
        dshift, dbias = offset_gradients(dh, scale, wanted[1], wanted[4])
        return None, dshift, None, None, dbias
    return call(grads, read, wanted)  # type: ignore[no-any-return]


def _residual_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """The gradient of x is the one of x1, and so is that of a branch without a gate."""
    (dx1,) = grads
    dx = None if wanted[0] is None else dx1
    dbranch = None
    _, of_branch, *of_vectors = wanted
    if of_branch is not None and read[1] is None:
        dbranch, of_branch = dx1.to(of_branch), None
    if of_branch is None and not any(of_vectors):
        return dx, dbranch, None, None
    by_op, dgate, dbranch_bias = call(grads, read, (of_branch, *of_vectors))
    return dx, dbranch if by_op is None else by_op, dgate, dbranch_bias


def _residual_norm_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    dx1, dh = grads
    x1, _, gate, scale, *_ = read
    if x1 is None:
        dshift, dbias = offset_gradients(dh, scale, wanted[3], wanted[7])
        return None, None, None, dshift, None, None, None, dbias
    if dh is None:
        dh = torch.zeros_like(x1)
    of_x, of_branch, *of_vectors = wanted
    if of_branch is None or gate is not None:
        return call((dx1, dh), read, wanted)  # type: ignore[no-any-return]
    # The gradient of a branch without a gate is that of x: the kernel writes it once.
    dx, _, *vectors = call((dx1, dh), read, (x1.dtype, None, *of_vectors))
    return (None if of_x is None else dx, dx.to(of_branch), *vectors)


# ---- Declarations ----------------------------------------------------------------------------------------------------


def _sizes(given: Given, sizes: Sizes) -> Sizes:
    """The axis of ``stats``: mean and rstd, or rstd alone."""
    return {"S": 1 if given["norm"] == "rmsnorm" else 2}


def _kept(x: Tensor, norm: str, eps: float, **rest: Any) -> tuple[Tensor, ...]:
    _, stats = norm_formula(x, None, None, None, None, norm, eps, x.dtype, True)
    assert stats is not None
    return (stats,)


def _kept_of_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None, norm: str, eps: float, **rest: Any
) -> tuple[Tensor, ...]:
    return _kept(reference.gated_residual(x, branch, gate, branch_bias=branch_bias), norm, eps)


_ODD = {"B": 3, "N": 7, "D": 45}
_XL = {"B": 3, "N": 5, "D": 1152}
_RMS = {"norm": "rmsnorm"}

MODULATE_NORM = declare(
    "modulate_norm",
    inputs="x: BND, shift: BD?, scale: BD?, weight: D?, bias: D?",
    options="norm: str, eps: float, out_dtype: ScalarType",
    outputs="h: BND = out_dtype, stats: BNS = wide if keep",
    sizes=_sizes,
    check=check_norm,
    row="D",
    shards="BN",
    meaning=reference.modulate_norm,
    wider=wider("modulate_norm"),
    kept=_kept,
    gradient=Gradient(
        reads="x scale weight bias stats",
        options="norm",
        needs={"x": "x scale weight stats", "scale": "x weight bias stats", "weight": "x scale stats", "bias": "scale"},
        formula=_norm_gradients,
    ),
    examples=(Example(_ODD, present="shift scale"), Example(_ODD, present="weight bias"), Example(_XL, _RMS)),
)
GATED_RESIDUAL = declare(
    "gated_residual",
    inputs="x: BND, branch: BND, gate: BD?, branch_bias: D?",
    outputs="x1: BND = x",
    row="D",
    shards="BND",
    meaning=reference.gated_residual,
    wider=wider("gated_residual"),
    gradient=Gradient(
        reads="branch gate branch_bias",
        needs={"branch branch_bias": "gate", "gate": "branch branch_bias"},
        gives="branch gate branch_bias",
        formula=_residual_gradients,
    ),
    examples=(Example(_ODD, present=""), Example(_ODD), Example(_XL, present="gate")),
)
GATED_RESIDUAL_NORM = declare(
    "gated_residual_norm",
    inputs="x: BND, branch: BND, gate: BD?, shift: BD?, scale: BD?, branch_bias: D?, weight: D?, bias: D?",
    options="norm: str, eps: float, out_dtype: ScalarType",
    outputs="x1: BND = x, h: BND = out_dtype, stats: BNS = wide if keep",
    sizes=_sizes,
    check=check_norm,
    row="D",
    shards="BN",
    meaning=reference.gated_residual_norm,
    wider=wider("gated_residual_norm"),
    kept=_kept_of_residual,
    gradient=Gradient(
        reads="x1 branch gate scale branch_bias weight bias stats",
        options="norm",
        needs={
            "x": "x1 scale weight stats",
            "branch branch_bias": "x1 gate scale weight stats",
            "gate": "x1 branch branch_bias scale weight stats",
            "scale": "x1 weight bias stats",
            "weight": "x1 scale stats",
            "bias": "scale",
        },
        formula=_residual_norm_gradients,
    ),
    examples=(Example(_ODD, present="gate shift scale"), Example(_ODD, present="branch_bias weight bias"), Example(_XL, _RMS)),
)


# ---- The torch backend: torch's own fused pieces, which round where plain PyTorch rounds -----------------------------


def _promoted(tensors: Sequence[Tensor | None], wanted: Wanted = ()) -> torch.dtype:
    """The dtype in which plain PyTorch computes with tensors, as far as they are there, and with those whose gradient is wanted."""
    kinds = {t.dtype for t in tensors if t is not None} | {dtype for dtype in wanted if dtype is not None}
    return kinds.pop() if len(kinds) == 1 else reduce(torch.promote_types, kinds)


def _own(x: Tensor, vector: Tensor | None) -> Tensor | None:
    """A vector of all rows as torch's layer norm takes it.

    On a CPU statistics come in the weight's dtype, and the norm without a weight takes twice as long.
    """
    on_cpu = x.device.type == "cpu"
    dtype = accumulator(x) if on_cpu else x.dtype
    if vector is None:
        return x.new_ones(x.shape[-1], dtype=dtype) if on_cpu else None
    return in_dtype(vector.reshape(-1), dtype)


def _affine(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the normed rows are multiplied by and what is then added, each (D,) or (B, 1, D); products are as wide as x."""
    if scale is not None:
        modulation = 1 + scale.unsqueeze(1)
        wide = modulation if weight is None and bias is None else in_dtype(modulation, _promoted((x, scale)))
        weight = modulation if weight is None else wide * weight
        bias = None if bias is None else wide * bias
    if shift is not None:
        bias = shift.unsqueeze(1) if bias is None else bias + shift.unsqueeze(1)
    return weight, bias


def _applied(normed: Tensor, factor: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """normed·factor + offset in ``dtype``, in the memory of ``normed`` where that has the dtype."""
    out = normed if normed.dtype == dtype else None
    if factor is None:
        h = normed if offset is None else torch.add(normed, offset, out=out)
    else:
        h = torch.mul(normed, factor, out=out) if offset is None else torch.addcmul(offset, normed, factor, out=out)
    return in_dtype(h, dtype)


@GATED_RESIDUAL.implement("torch", plain=reference.gated_residual)
def residual_forward(x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    """x1 in x's dtype."""
    u = branch if branch_bias is None else branch + branch_bias
    out = u if u is not branch and u.dtype == x.dtype else None
    x1 = torch.add(x, u, out=out) if gate is None else torch.addcmul(x, gate.unsqueeze(1), u, out=out)
    return in_dtype(x1, x.dtype).contiguous()


@MODULATE_NORM.implement("torch", plain=reference.modulate_norm)
def norm_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    norm: str, eps: float, out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The modulated norm in ``out_dtype``, and mean and rstd of each row. What all rows share goes into torch's layer norm."""
    factor, offset = _affine(x, shift, scale, weight, bias)
    if norm == "rmsnorm":
        values = in_dtype(x, accumulator(x))
        stats = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        h = _applied(in_dtype(values * stats, x.dtype), factor, offset, out_dtype)
        return h.contiguous(), stats if keep else None
    vectors = [v for v in (factor, offset) if v is not None]
    shared = all(v.numel() == x.shape[-1] for v in vectors) and _promoted((x, *vectors)) == x.dtype
    weight, bias = (factor, offset) if shared else (None, None)
    # A compiler, which would round the statistics to the rows' dtype, fuses the cast that keeps it from that.
    rows = x if is_plain(x) else in_dtype(x, accumulator(x))
    bias = None if bias is None else _own(rows, bias)
    h, *halves = torch.native_layer_norm(rows, rows.shape[-1:], _own(rows, weight), bias, eps)
    h = in_dtype(h, out_dtype) if shared else _applied(h, factor, offset, out_dtype)
    return h, in_dtype(torch.cat(halves, -1), accumulator(x)) if keep else None


@GATED_RESIDUAL_NORM.implement("torch", plain=reference.gated_residual_norm)
def residual_norm_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float,
    out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """x1, the modulated norm of x1 as it is stored, and mean and rstd of its rows."""
    x1 = residual_forward(x, branch, gate, branch_bias)
    return (x1, *norm_forward(x1, shift, scale, weight, bias, norm, eps, out_dtype, keep))


@GATED_RESIDUAL.gradients.implement("torch")
def residual_backward(
    dx1: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """dbranch, dgate and dbranch_bias, as far as they are wanted."""
    of_branch, of_gate, of_bias = wanted
    dx = in_dtype(dx1, _promoted((branch, gate, branch_bias), wanted))
    product = dbranch = dgate = dbias = None
    sums = dx.sum(1) if of_bias or (of_gate and branch_bias is not None) else None
    if of_gate and branch is not None:
        product = dx * branch
        dgate = product.sum(1)
        dgate = in_dtype(dgate if sums is None or branch_bias is None else dgate + branch_bias * sums, of_gate)
    if of_branch:
        dbranch = dx.clone() if gate is None else torch.mul(dx, gate.unsqueeze(1), out=product)
        dbranch = in_dtype(dbranch, of_branch).contiguous()
    if of_bias and sums is not None:
        dbias = in_dtype((sums if gate is None else gate * sums).sum(0), of_bias)
    return dbranch, dgate, dbias


@MODULATE_NORM.gradients.implement("torch")
def norm_backward(
    dh: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, shift, scale, weight and bias, as far as they are wanted."""
    of_x, of_shift, of_scale, of_weight, of_bias = wanted
    with_q = of_scale is not None or of_weight is not None
    factor, _ = _affine(x, None, scale, weight, None)
    dh = in_dtype(dh, _promoted((x, scale, weight, bias), wanted[1:]))
    p = dh.sum(1) if of_shift or of_bias or (of_scale and bias is not None) else None
    dx = q = product = None
    if of_x and norm == "rmsnorm":
        dx = through_norm(in_dtype(dh if factor is None else dh * factor, stats.dtype), normed_rows(x, stats), stats)
    if with_q:
        # Not by torch's backward of a layer norm, which adds rows up one by one in their own dtype.
        product = in_dtype(_normed(x, stats), dh.dtype).mul_(dh)
        q = product.sum(1)
    if of_x and norm == "layernorm":
        dnormed = in_dtype(dh if factor is None else torch.mul(dh, factor, out=product), x.dtype)
        reads = (x, x.shape[-1:], *_halves(stats), _own(x, None), None)
        dx = torch.ops.aten.native_layer_norm_backward(dnormed, *reads, (True, False, False))[0]
    dx = None if dx is None or of_x is None else in_dtype(dx, of_x).contiguous()
    return (dx, *vector_gradients(p, q, scale, weight, bias, wanted[1:]))


def _halves(stats: Tensor) -> tuple[Tensor, ...]:
    """Mean and rstd of all rows, each (B, N, 1) and packed, as torch's kernels take them."""
    return stats.permute(2, 0, 1).unsqueeze(3).contiguous().unbind()


def _normed(x: Tensor, stats: Tensor) -> Tensor:
    """x̂, rounded to x's dtype, a new tensor."""
    if x.dtype == stats.dtype or stats.shape[-1] == 1:
        return in_dtype(normed_rows(x, stats), x.dtype)
    # torch's batch norm, which takes each row for a channel here, applies fp32 statistics to a narrower dtype in one pass.
    mean, rstd = (half.flatten() for half in _halves(stats))
    rows = x.reshape(1, -1, x.shape[-1])
    return torch.native_batch_norm(rows, rstd, None, mean, torch.ones_like(mean), False, 0.0, 0.0)[0].view(x.shape)


@GATED_RESIDUAL_NORM.gradients.implement("torch")
def residual_norm_backward(
    dx1: Tensor | None, dh: Tensor, x1: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    stats: Tensor, norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of all inputs in their order, as far as they are wanted."""
    of_x, of_branch, of_gate, of_shift, of_scale, of_branch_bias, of_weight, of_bias = wanted
    of_residual = (of_branch, of_gate, of_branch_bias)
    of_stream = x1.dtype if of_x or any(of_residual) else None
    asked = (of_stream, of_shift, of_scale, of_weight, of_bias)
    dx, *dnorm = norm_backward(dh, x1, scale, weight, bias, stats, norm, asked)
    dbranch = dgate = dbranch_bias = None
    if dx is not None:
        dx = dx if dx1 is None else dx.add_(dx1)
        if any(of_residual):
            dbranch, dgate, dbranch_bias = residual_backward(dx, branch, gate, branch_bias, of_residual)
    dshift, dscale, dweight, dbias = dnorm
    return in_dtype(dx, of_x) if dx is not None and of_x else None, dbranch, dgate, dshift, dscale, dbranch_bias, dweight, dbias


for _op in (MODULATE_NORM, GATED_RESIDUAL, GATED_RESIDUAL_NORM):
    for _each in (_op, _op.gradients):
        _each.implement_elsewhere("cuda", refuse=_native.refuse_cuda)
        _each.implement_elsewhere("cpu", refuse=_native.refuse_cpu)
        _each.implement_later("triton", f"{__name__}.triton")
