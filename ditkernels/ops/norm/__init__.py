"""Norm, modulation and gated residual: ``modulate_norm``, ``gated_residual``, ``gated_residual_norm``.

Forward, for token n of sample b, over channels d (all arithmetic in fp32, or fp64 for fp64 inputs):

    u  = branch + branch_bias                       x1 = x + gate_b · u
    x̂  = (x1 - mean) · rstd        layernorm: mean over d, rstd = (var + eps)^-1/2
                                   rmsnorm:   mean = 0,    rstd = (mean of squares + eps)^-1/2
    h  = (x̂ · weight + bias) · (1 + scale_b) + shift_b

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

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _native
from ditkernels.ops.dispatch import Whole, declare
from ditkernels.ops.spec import Example, Given, Gradient, Sizes, Wanted, accumulator, check_norm

__all__ = ["gated_residual", "gated_residual_norm", "modulate_norm"]

# ---- Public functions ------------------------------------------------------------------------------------------------


def modulate_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x)·(1 + scale) + shift, in one pass over x.

    Args:
        x: (B, N, D), any strides.
        shift, scale: (B, D), each optional.
        weight, bias: (D,), the norm's own affine parameters, each optional.
        norm: "layernorm" or "rmsnorm".
        eps: added to the variance (layernorm) or to the mean square (rmsnorm).
        out_dtype: of the result; by default autocast's dtype where autocast is on, else x's.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own; arithmetic is in fp32.

    Returns:
        (B, N, D).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    out_dtype = out_dtype or MODULATE_NORM.autocast_dtype(x) or x.dtype
    return MODULATE_NORM((x, shift, scale, weight, bias), (norm, eps, out_dtype))  # type: ignore[no-any-return]


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None = None, *, branch_bias: Tensor | None = None) -> Tensor:
    """x + gate·(branch + branch_bias), in x's dtype.

    Args:
        x, branch: (B, N, D), any strides, dtypes independent of each other.
        gate: (B, D), or None for an ungated residual.
        branch_bias: (D,), the bias of the linear that made the branch, if that linear left it to this op.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        As ``modulate_norm``.
    """
    return GATED_RESIDUAL((x, branch, gate, branch_bias))  # type: ignore[no-any-return]


def gated_residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, shift: Tensor | None = None,
    scale: Tensor | None = None, *, branch_bias: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, norm: str = "layernorm", eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x1 = x + gate·(branch + branch_bias) and h = norm(x1)·(1 + scale) + shift, in one pass.

    Arguments as in ``gated_residual`` and ``modulate_norm``; ``out_dtype`` is h's.

    Returns:
        (x1, h), both (B, N, D): x1 in x's dtype; h is the norm of x1 as stored, so that backward sees the same rows.

    Raises:
        As ``modulate_norm``.
    """
    out_dtype = out_dtype or GATED_RESIDUAL_NORM.autocast_dtype(x) or x.dtype
    tensors = (x, branch, gate, shift, scale, branch_bias, weight, bias)
    return GATED_RESIDUAL_NORM(tensors, (norm, eps, out_dtype))  # type: ignore[no-any-return]


# ---- Gradients: what the backward ops leave to plain PyTorch ---------------------------------------------------------


def _norm_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> tuple[Tensor | None, ...]:
    (dh,) = grads
    x, scale, *_ = read
    if x is None:
        dshift, dbias = _offset_gradients(dh, scale, wanted[1], wanted[4])
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
        dshift, dbias = _offset_gradients(dh, scale, wanted[3], wanted[7])
        return None, None, None, dshift, None, None, None, dbias
    if dh is None:
        dh = torch.zeros_like(x1)
    of_x, of_branch, *of_vectors = wanted
    if of_branch is None or gate is not None:
        return call((dx1, dh), read, wanted)  # type: ignore[no-any-return]
    # The gradient of a branch without a gate is that of x: the kernel writes it once.
    dx, _, *vectors = call((dx1, dh), read, (x1.dtype, None, *of_vectors))
    return (None if of_x is None else dx, dx.to(of_branch), *vectors)


def _offset_gradients(
    dh: Tensor | None, scale: Tensor | None, of_shift: torch.dtype | None, of_bias: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """dshift and dbias where nothing else is wanted: they need no normed row."""
    if dh is None:
        return None, None
    p = dh.sum(1, dtype=accumulator(dh))
    dbias = p if scale is None else (1 + scale.to(p.dtype)) * p
    return (None if of_shift is None else p.to(of_shift)), (None if of_bias is None else dbias.sum(0).to(of_bias))


# ---- Declarations ----------------------------------------------------------------------------------------------------


def _sizes(given: Given, sizes: Sizes) -> Sizes:
    """The axis of ``stats``: mean and rstd, or rstd alone."""
    return {"S": 1 if given["norm"] == "rmsnorm" else 2}


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


# ---- The torch backend: the formulas at the top of this file, one by one ---------------------------------------------


def per_token(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A (B, D) vector as (B, 1, D), a (D,) vector as it is, in the accumulation dtype."""
    if vector is None:
        return None
    return vector.to(dtype).unsqueeze(1) if vector.dim() == 2 else vector.to(dtype)


def normed_rows(x: Tensor, stats: Tensor) -> Tensor:
    """x̂ from x and the saved statistics, in the accumulation dtype."""
    values = x.to(accumulator(x))
    if stats.shape[-1] == 2:
        values = values - stats[..., :1]
    return values * stats[..., -1:]


@GATED_RESIDUAL.implement("torch")
def residual_forward(x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    """x1 = x + gate·(branch + branch_bias), rounded once to x's dtype."""
    wide = accumulator(x)
    u = branch.to(wide)
    if branch_bias is not None:
        u = u + branch_bias.to(wide)
    g = per_token(gate, wide)
    return (x.to(wide) + (u if g is None else g * u)).to(x.dtype).contiguous()


@MODULATE_NORM.implement("torch")
def norm_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    norm: str, eps: float, out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The modulated norm in ``out_dtype``, and mean and rstd of each row."""
    wide = accumulator(x)
    values = x.to(wide)
    mean = values.mean(-1, keepdim=True)
    centred = values if norm == "rmsnorm" else values - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    h = centred * rstd
    if weight is not None:
        h = h * weight.to(wide)
    if bias is not None:
        h = h + bias.to(wide)
    if scale is not None:
        h = h * (1 + scale.to(wide).unsqueeze(1))
    if shift is not None:
        h = h + shift.to(wide).unsqueeze(1)
    stats = rstd if norm == "rmsnorm" else torch.cat([mean, rstd], -1)
    return h.to(out_dtype).contiguous(), stats if keep else None


@GATED_RESIDUAL_NORM.implement("torch")
def residual_norm_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float,
    out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """x1, the modulated norm of x1 as it is stored, and mean and rstd of its rows."""
    x1 = residual_forward(x, branch, gate, branch_bias)
    return (x1, *norm_forward(x1, shift, scale, weight, bias, norm, eps, out_dtype, keep))


def through_norm(dh: Tensor, normed: Tensor, scale: Tensor | None, weight: Tensor | None, stats: Tensor) -> Tensor:
    """The norm's dx in the accumulation dtype."""
    dnormed = dh
    if scale is not None:
        dnormed = dnormed * (1 + scale.to(dh.dtype).unsqueeze(1))
    if weight is not None:
        dnormed = dnormed * weight.to(dh.dtype)
    dx = dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)
    if stats.shape[-1] == 2:
        dx = dx - dnormed.mean(-1, keepdim=True)
    return dx * stats[..., -1:]


def norm_vector_gradients(
    dh: Tensor, normed: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dshift, dscale, dweight, dbias, as far as they are wanted, from the sums P and Q."""
    of_shift, of_scale, of_weight, of_bias = wanted
    p = dh.sum(1) if of_shift or of_scale or of_bias else dh.new_empty(0)
    q = (dh * normed).sum(1) if of_scale or of_weight else dh.new_empty(0)
    modulation = 1 if scale is None else 1 + scale.to(dh.dtype)
    dshift = p.clone().to(of_shift) if of_shift else None
    dscale = dweight = dbias = None
    if of_scale:
        through_weight = q if weight is None else weight.to(q.dtype) * q
        dscale = (through_weight if bias is None else through_weight + bias.to(q.dtype) * p).to(of_scale)
    if of_weight:
        dweight = (modulation * q).sum(0).to(of_weight)
    if of_bias:
        dbias = (modulation * p).sum(0).to(of_bias)
    return dshift, dscale, dweight, dbias


@GATED_RESIDUAL.gradients.implement("torch")
def residual_backward(
    dx1: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """dbranch, dgate and dbranch_bias, as far as they are wanted."""
    of_branch, of_gate, of_bias = wanted
    wide = accumulator(dx1)
    dx = dx1.to(wide)
    g = per_token(gate, wide)
    dbranch = dgate = dbias = None
    if of_branch:
        dbranch = (dx.clone() if g is None else g * dx).to(of_branch).contiguous()
    if of_gate and branch is not None:
        u = branch.to(wide) if branch_bias is None else branch.to(wide) + branch_bias.to(wide)
        dgate = (dx * u).sum(1).to(of_gate)
    if of_bias:
        sums = dx.sum(1)
        dbias = (sums if gate is None else gate.to(wide) * sums).sum(0).to(of_bias)
    return dbranch, dgate, dbias


@MODULATE_NORM.gradients.implement("torch")
def norm_backward(
    dh: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, shift, scale, weight and bias, as far as they are wanted."""
    of_x, *of_vectors = wanted
    dh, normed = dh.to(accumulator(x)), normed_rows(x, stats)
    dx = through_norm(dh, normed, scale, weight, stats).to(of_x).contiguous() if of_x else None
    return (dx, *norm_vector_gradients(dh, normed, scale, weight, bias, tuple(of_vectors)))


@GATED_RESIDUAL_NORM.gradients.implement("torch")
def residual_norm_backward(
    dx1: Tensor | None, dh: Tensor, x1: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, branch_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    stats: Tensor, norm: str, wanted: Wanted,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of all inputs in their order, as far as they are wanted."""
    of_x, of_branch, of_gate, of_shift, of_scale, of_branch_bias, of_weight, of_bias = wanted
    dh, normed = dh.to(accumulator(x1)), normed_rows(x1, stats)
    dx = through_norm(dh, normed, scale, weight, stats)
    if dx1 is not None:
        dx = dx + dx1.to(dx.dtype)
    residual = (of_branch, of_gate, of_branch_bias)
    dbranch, dgate, dbranch_bias = residual_backward(dx, branch, gate, branch_bias, residual)
    dshift, dscale, dweight, dbias = norm_vector_gradients(
        dh, normed, scale, weight, bias, (of_shift, of_scale, of_weight, of_bias)
    )
    dx = dx.to(of_x).contiguous() if of_x else None  # type: ignore[assignment]
    return dx, dbranch, dgate, dshift, dscale, dbranch_bias, dweight, dbias


for _op in (MODULATE_NORM, GATED_RESIDUAL, GATED_RESIDUAL_NORM):
    for _each in (_op, _op.gradients):
        _each.implement_elsewhere("cuda", refuse=_native.refuse_cuda)
        _each.implement_elsewhere("cpu", refuse=_native.refuse_cpu)
