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

Saved for backward: the stream x1 (for ``modulate_norm`` its input), the branch, mean and rstd of each row in fp32, and the vectors.
The branch is saved because it cannot be recovered where the gate is zero, which is how adaLN-Zero starts.

Layer norm: Ba et al. 2016 (arXiv 1607.06450); RMS norm: Zhang & Sennrich 2019 (arXiv 1910.07467); adaLN-Zero: arXiv 2212.09748.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _checks as checks
from ditkernels.ops import _registry as registry

# ------------------------------------------------------------------------------------------------------------------
# Public functions
# ------------------------------------------------------------------------------------------------------------------


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
    registry.refuse_forward_ad("modulate_norm", x, shift, scale, weight, bias)
    out_dtype = out_dtype or registry.autocast_dtype(x) or x.dtype
    y, _, _ = torch.ops.ditkernels.modulate_norm(x, shift, scale, weight, bias, norm, eps, out_dtype)
    return y


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, *, branch_bias: Tensor | None = None
) -> Tensor:
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
    registry.refuse_forward_ad("gated_residual", x, branch, gate, branch_bias)
    return torch.ops.ditkernels.gated_residual(x, branch, gate, branch_bias)


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    branch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x1 = x + gate·(branch + branch_bias) and h = norm(x1)·(1 + scale) + shift, in one pass.

    Arguments as in ``gated_residual`` and ``modulate_norm``; ``out_dtype`` is h's.

    Returns:
        (x1, h), both (B, N, D): x1 in x's dtype; h is the norm of x1 as stored, so that backward sees the same rows.

    Raises:
        As ``modulate_norm``.
    """
    registry.refuse_forward_ad(
        "gated_residual_norm", x, branch, gate, shift, scale, branch_bias, weight, bias
    )
    out_dtype = out_dtype or registry.autocast_dtype(x) or x.dtype
    x1, h, _, _ = torch.ops.ditkernels.gated_residual_norm(
        x, branch, gate, shift, scale, branch_bias, weight, bias, norm, eps, out_dtype
    )
    return x1, h


# ------------------------------------------------------------------------------------------------------------------
# Checks and fake kernels
# ------------------------------------------------------------------------------------------------------------------


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, of mean and rstd and of all sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def empty_like_or_none(value: Tensor | None, like: Tensor) -> Tensor:
    """The gradient's buffer of an optional argument: contiguous, and (0,) where the argument is absent."""
    return _empty(like, 0) if value is None else _empty(like, *value.shape, dtype=value.dtype)


def _check_norm_arguments(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    batch, _, width = checks.tokens("x", x)
    checks.optional("shift", shift, (batch, width), x)
    checks.optional("scale", scale, (batch, width), x)
    checks.optional("weight", weight, (width,), x)
    checks.optional("bias", bias, (width,), x)
    checks.norm(norm, eps)
    checks.dtype("out_dtype", out_dtype)


def _check_residual_arguments(
    x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None
) -> None:
    batch, length, width = checks.tokens("x", x)
    checks.tensor("branch", branch, (batch, length, width), x)
    checks.optional("gate", gate, (batch, width), x)
    checks.optional("branch_bias", branch_bias, (width,), x)


def _check_residual_norm_arguments(
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
) -> None:
    _check_residual_arguments(x, branch, gate, branch_bias)
    _check_norm_arguments(x, shift, scale, weight, bias, norm, eps, out_dtype)


def _check_norm_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    norm: str,
) -> None:
    batch, length, width = checks.tokens("x", x)
    checks.tensor("dy", dy, (batch, length, width), x)
    checks.tensor("rstd", rstd, (batch, length), x)
    checks.optional("shift", shift, (batch, width), x)
    checks.optional("scale", scale, (batch, width), x)
    checks.norm(norm, 0.0)


def _check_residual_backward(
    dy: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None
) -> None:
    _check_residual_arguments(dy, branch, gate, branch_bias)


def _check_residual_norm_backward(
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
) -> None:
    _check_residual_arguments(x1, branch, gate, branch_bias)
    _check_norm_backward(dh, x1, scale, weight, bias, mean, rstd, shift, norm)
    checks.optional("dx1", dx1, tuple(x1.shape), x1)


def _rows(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    stats = accumulator(x)
    mean = _empty(x, *((0,) if norm == "rmsnorm" else x.shape[:2]), dtype=stats)
    return mean, _empty(x, *x.shape[:2], dtype=stats)


def _fake_modulate_norm(x, shift, scale, weight, bias, norm, eps, out_dtype):  # type: ignore[no-untyped-def]
    return (_empty(x, *x.shape, dtype=out_dtype), *_rows(x, norm))


def _fake_modulate_norm_backward(dy, x, scale, weight, bias, mean, rstd, shift, norm):  # type: ignore[no-untyped-def]
    return (_empty(x, *x.shape), *(empty_like_or_none(v, x) for v in (shift, scale, weight, bias)))


def _fake_gated_residual(x, branch, gate, branch_bias):  # type: ignore[no-untyped-def]
    return _empty(x, *x.shape)


def _fake_gated_residual_backward(dy, branch, gate, branch_bias):  # type: ignore[no-untyped-def]
    dbranch = _empty(branch, *((0,) if gate is None else branch.shape))
    return dbranch, empty_like_or_none(gate, dy), empty_like_or_none(branch_bias, dy)


def _fake_gated_residual_norm(  # type: ignore[no-untyped-def]
    x, branch, gate, shift, scale, branch_bias, weight, bias, norm, eps, out_dtype
):
    return (_empty(x, *x.shape), _empty(x, *x.shape, dtype=out_dtype), *_rows(x, norm))


def _fake_gated_residual_norm_backward(  # type: ignore[no-untyped-def]
    dx1, dh, x1, branch, gate, scale, branch_bias, weight, bias, mean, rstd, shift, norm
):
    dbranch = _empty(branch, *((0,) if gate is None else branch.shape))
    vectors = (gate, shift, scale, branch_bias, weight, bias)
    return (_empty(x1, *x1.shape), dbranch, *(empty_like_or_none(v, x1) for v in vectors))


# ------------------------------------------------------------------------------------------------------------------
# Declarations
# ------------------------------------------------------------------------------------------------------------------

_NORM = (
    "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, str norm, float eps, ScalarType out_dtype"
)
_SAVED = "Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? shift, str norm"

MODULATE_NORM = registry.declare(
    "modulate_norm",
    f"(Tensor x, {_NORM}) -> (Tensor y, Tensor mean, Tensor rstd)",
    check=_check_norm_arguments,
    fake=_fake_modulate_norm,
)
MODULATE_NORM_BACKWARD = registry.declare(
    "modulate_norm_backward",
    f"(Tensor dy, Tensor x, Tensor? scale, {_SAVED})"
    " -> (Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias)",
    check=_check_norm_backward,
    fake=_fake_modulate_norm_backward,
)
GATED_RESIDUAL = registry.declare(
    "gated_residual",
    "(Tensor x, Tensor branch, Tensor? gate, Tensor? branch_bias) -> Tensor",
    check=_check_residual_arguments,
    fake=_fake_gated_residual,
)
GATED_RESIDUAL_BACKWARD = registry.declare(
    "gated_residual_backward",
    "(Tensor dy, Tensor branch, Tensor? gate, Tensor? branch_bias)"
    " -> (Tensor dbranch, Tensor dgate, Tensor dbranch_bias)",
    check=_check_residual_backward,
    fake=_fake_gated_residual_backward,
)
GATED_RESIDUAL_NORM = registry.declare(
    "gated_residual_norm",
    "(Tensor x, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? branch_bias, Tensor? weight,"
    " Tensor? bias, str norm, float eps, ScalarType out_dtype) -> (Tensor x1, Tensor h, Tensor mean, Tensor rstd)",
    check=_check_residual_norm_arguments,
    fake=_fake_gated_residual_norm,
)
GATED_RESIDUAL_NORM_BACKWARD = registry.declare(
    "gated_residual_norm_backward",
    "(Tensor? dx1, Tensor dh, Tensor x1, Tensor branch, Tensor? gate, Tensor? scale, Tensor? branch_bias, "
    f"{_SAVED}) -> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale, Tensor dbranch_bias,"
    " Tensor dweight, Tensor dbias)",
    check=_check_residual_norm_backward,
    fake=_fake_gated_residual_norm_backward,
)

# ------------------------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------------------------


def present(gradient: Tensor, argument: Tensor | None) -> Tensor | None:
    """A backward op returns (0,) for an absent argument; autograd wants None."""
    return None if argument is None else gradient


def _setup_modulate_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, weight, bias, norm, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, weight, bias, mean, rstd, shift)
    ctx.norm = norm


def _backward_modulate_norm(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, scale, weight, bias, mean, rstd, shift = ctx.saved_tensors
    dx, *vectors = MODULATE_NORM_BACKWARD.call(dy, x, scale, weight, bias, mean, rstd, shift, ctx.norm)
    return (dx, *map(present, vectors, (shift, scale, weight, bias)), None, None, None)


def _setup_gated_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gate, branch_bias = inputs
    ctx.save_for_backward(branch, gate, branch_bias)


def _backward_gated_residual(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate, branch_bias = ctx.saved_tensors
    if gate is None and branch_bias is None:
        return dy, dy.to(branch.dtype), None, None
    dbranch, dgate, dbranch_bias = GATED_RESIDUAL_BACKWARD.call(dy, branch, gate, branch_bias)
    if gate is None:
        dbranch = dy.to(branch.dtype)
    return dy, dbranch, present(dgate, gate), present(dbranch_bias, branch_bias)


def _setup_gated_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, branch_bias, weight, bias, norm, _, _ = inputs
    x1, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x1, branch, gate, scale, branch_bias, weight, bias, mean, rstd, shift)
    ctx.norm = norm


def _backward_gated_residual_norm(
    ctx: Any, dx1: Tensor | None, dh: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    x1, branch, gate, scale, branch_bias, weight, bias, mean, rstd, shift = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(x1)
    dx, dbranch, *vectors = GATED_RESIDUAL_NORM_BACKWARD.call(
        dx1, dh, x1, branch, gate, scale, branch_bias, weight, bias, mean, rstd, shift, ctx.norm
    )
    if gate is None:
        dbranch = dx.to(branch.dtype)
    vectors = map(present, vectors, (gate, shift, scale, branch_bias, weight, bias))
    return (dx, dbranch, *vectors, None, None, None)


registry.differentiate(MODULATE_NORM, _setup_modulate_norm, _backward_modulate_norm)
registry.differentiate(GATED_RESIDUAL, _setup_gated_residual, _backward_gated_residual)
registry.differentiate(GATED_RESIDUAL_NORM, _setup_gated_residual_norm, _backward_gated_residual_norm)
for _op in (MODULATE_NORM_BACKWARD, GATED_RESIDUAL_BACKWARD, GATED_RESIDUAL_NORM_BACKWARD):
    registry.refuse_double_backward(_op)


# ------------------------------------------------------------------------------------------------------------------
# The torch backend: the formulas at the top of this file, one by one
# ------------------------------------------------------------------------------------------------------------------


def per_token(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A (B, D) vector as (B, 1, D), a (D,) vector as it is, in the accumulation dtype."""
    if vector is None:
        return None
    return vector.to(dtype).unsqueeze(1) if vector.dim() == 2 else vector.to(dtype)


def residual_forward(x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    """x1 = x + gate·(branch + branch_bias), rounded once to x's dtype."""
    wide = accumulator(x)
    u = branch.to(wide)
    if branch_bias is not None:
        u = u + branch_bias.to(wide)
    g = per_token(gate, wide)
    return (x.to(wide) + (u if g is None else g * u)).to(x.dtype)


def norm_forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The modulated norm in the accumulation dtype, with mean (absent for rmsnorm) and rstd of each row."""
    wide = accumulator(x)
    values = x.to(wide)
    if norm == "rmsnorm":
        mean = values.new_empty(0)
        centred = values
    else:
        mean = values.mean(-1)
        centred = values - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if scale is not None:
        y = y * (1 + scale.to(wide).unsqueeze(1))
    if shift is not None:
        y = y + shift.to(wide).unsqueeze(1)
    return y, mean, rstd


def norm_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm's dx, with the sums P = Σ_n dy and Q = Σ_n dy·x̂ of each sample, in the accumulation dtype."""
    wide = accumulator(x)
    dy = dy.to(wide)
    centred = x.to(wide) if norm == "rmsnorm" else x.to(wide) - mean.unsqueeze(-1)
    normed = centred * rstd.unsqueeze(-1)
    dnormed = dy
    if scale is not None:
        dnormed = dnormed * (1 + scale.to(wide).unsqueeze(1))
    if weight is not None:
        dnormed = dnormed * weight.to(wide)
    dx = dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)
    if norm == "layernorm":
        dx = dx - dnormed.mean(-1, keepdim=True)
    return dx * rstd.unsqueeze(-1), dy.sum(1), (dy * normed).sum(1)


def norm_vector_gradients(
    p: Tensor,
    q: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dshift, dscale, dweight, dbias from the sums P and Q (B, D); (0,) for an absent argument."""
    # Each absent gradient is a tensor of its own: outputs of an op must not alias.
    dshift, dscale, dweight, dbias = (p.new_empty(0) for _ in range(4))
    if shift is not None:
        dshift = p.clone().to(shift.dtype)
    if scale is not None:
        through_weight = q.clone() if weight is None else weight.to(q.dtype) * q
        dscale = (through_weight if bias is None else through_weight + bias.to(q.dtype) * p).to(scale.dtype)
    modulation = 1 if scale is None else 1 + scale.to(p.dtype)
    if weight is not None:
        dweight = (modulation * q).sum(0).to(weight.dtype)
    if bias is not None:
        dbias = (modulation * p).sum(0).to(bias.dtype)
    return dshift, dscale, dweight, dbias


def residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dbranch, dgate, dbranch_bias from the stream's gradient in the accumulation dtype; (0,) for an absent argument."""
    wide = dx.dtype
    sums = dx.sum(1)
    dbranch = branch.new_empty(0)
    dgate, dbranch_bias = dx.new_empty(0), dx.new_empty(0)
    if gate is not None:
        dbranch = (gate.to(wide).unsqueeze(1) * dx).to(branch.dtype)
        dgate = (dx * branch.to(wide)).sum(1)
        if branch_bias is not None:
            dgate = dgate + branch_bias.to(wide) * sums
        dgate = dgate.to(gate.dtype)
    if branch_bias is not None:
        dbranch_bias = (sums if gate is None else gate.to(wide) * sums).sum(0).to(branch_bias.dtype)
    return dbranch, dgate, dbranch_bias


def _torch_modulate_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = norm_forward(x, shift, scale, weight, bias, norm, eps)
    return y.to(out_dtype).contiguous(), mean, rstd


def _torch_modulate_norm_backward(
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
    dx, p, q = norm_backward(dy, x, scale, weight, mean, rstd, norm)
    return (dx.to(x.dtype).contiguous(), *norm_vector_gradients(p, q, shift, scale, weight, bias))


def _torch_gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None
) -> Tensor:
    return residual_forward(x, branch, gate, branch_bias).contiguous()


def _torch_gated_residual_backward(
    dy: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dbranch, dgate, dbranch_bias = residual_backward(dy.to(accumulator(dy)), branch, gate, branch_bias)
    return dbranch.contiguous(), dgate, dbranch_bias


def _torch_gated_residual_norm(
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
    x1 = _torch_gated_residual(x, branch, gate, branch_bias)
    return (x1, *_torch_modulate_norm(x1, shift, scale, weight, bias, norm, eps, out_dtype))


def _torch_gated_residual_norm_backward(
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
    dx, p, q = norm_backward(dh, x1, scale, weight, mean, rstd, norm)
    if dx1 is not None:
        dx = dx + dx1.to(dx.dtype)
    dbranch, dgate, dbranch_bias = residual_backward(dx, branch, gate, branch_bias)
    dshift, dscale, dweight, dbias = norm_vector_gradients(p, q, shift, scale, weight, bias)
    dx = dx.to(x1.dtype).contiguous()
    return dx, dbranch.contiguous(), dgate, dshift, dscale, dbranch_bias, dweight, dbias


registry.implement(MODULATE_NORM, "torch", _torch_modulate_norm)
registry.implement(MODULATE_NORM_BACKWARD, "torch", _torch_modulate_norm_backward)
registry.implement(GATED_RESIDUAL, "torch", _torch_gated_residual)
registry.implement(GATED_RESIDUAL_BACKWARD, "torch", _torch_gated_residual_backward)
registry.implement(GATED_RESIDUAL_NORM, "torch", _torch_gated_residual_norm)
registry.implement(GATED_RESIDUAL_NORM_BACKWARD, "torch", _torch_gated_residual_norm_backward)
