"""The end of a DiT: ``final_layer`` (last residual, norm, modulation, linear, unpatchify) and ``unpatchify`` alone.

Forward, for token n of sample b (all arithmetic in fp32, or fp64 for fp64 inputs):

    x1 = x + gate_b · (branch + branch_bias)                       rounded to x's dtype; without a branch x1 = x
    h  = (x̂ · norm_weight + norm_bias) · (1 + scale_b) + shift_b   x̂: x1 normed, as in adaln.py; rounded to weight's dtype
    z  = W · h + bias                                              (p·p·O) values, ordered (row, column, output channel)
    out[b, o, i·p + r, j·p + c] = z[b, i·w + j, (r·p + c)·O + o]   for token (i, j) of the grid (h, w)

Backward: dz is dout gathered by the last line (``unpatchify`` is a permutation, and its backward the inverse one). Then

    dW = Σ_bn dz ⊗ h      dbias = Σ_bn dz      dh = Wᵀ · dz      dx̂ = dh · (1 + scale_b) · norm_weight
    dx1 = rstd · (dx̂ - mean_d(dx̂) - x̂ · mean_d(dx̂ · x̂))         (rmsnorm: without mean_d(dx̂))

and the gradients of the vectors from P, Q, R and S as in adaln.py. h and x1 are recomputed.

The two means look as if they wanted a whole row of x before its first gradient can be written. They do not. The linear is linear:
V = p·p·O values hold all that the means need of D channels. Once for all tokens of a sample, with a = (1 + scale) · norm_weight,

    slope_v  = Σ_d W_vd · a_d
    offset_v = Σ_d W_vd · (norm_bias_d · (1 + scale_d) + shift_d) + bias_v

so that z_v = Σ_d W_vd · a_d · x̂_d + offset_v, and with dx̂_d = a_d · Σ_v W_vd · dz_v,

    mean_d(dx̂)     = Σ_v dz_v · slope_v / D
    mean_d(dx̂ · x̂) = Σ_v dz_v · (z_v - offset_v) / D

The op's own result holds z, so backward takes ``out`` and visits each element of x once. The z read is the z written, after h and
it were rounded; that moves the second mean by about eps·|dx̂|/√D. Hence the result of the op is never narrower than the weight;
the public function rounds it further where it is asked to.

Saved for backward: out, x, the branch, mean and rstd of each row in fp32, the vectors and the weight. The branch is saved and not
x1, because the gradient of the gate needs it and x1 follows from it.

Source: Peebles & Xie, arXiv 2212.09748; the order (row, column, channel) is that of the public checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _checks as checks
from ditkernels.ops import _registry as registry
from ditkernels.ops import adaln
from ditkernels.ops.adaln import accumulator
from ditkernels.ops.patch_embed import product, token_grid

# ------------------------------------------------------------------------------------------------------------------
# Public functions
# ------------------------------------------------------------------------------------------------------------------


def unpatchify(tokens: Tensor, *, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Puts patches back in their places: (B, h·w, p·p·O) -> (B, O, h·p, w·p).

    Args:
        tokens: (B, N, p·p·O), any strides, fp32, bf16, fp16 or fp64; a token's values are ordered (row in patch,
            column in patch, output channel).
        grid: (h, w) with h·w = N; tokens are in row-major order.
        patch_size: p.

    Returns:
        (B, O, h·p, w·p) in the dtype of ``tokens``, a new tensor.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    registry.refuse_forward_ad("unpatchify", tokens)
    return torch.ops.ditkernels.unpatchify(tokens, *grid, patch_size)


def final_layer(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    patch_size: int,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    branch_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """unpatchify(linear(norm(x1)·(1 + scale) + shift)), where x1 = x, or x + gate·(branch + branch_bias) given a branch.

    Args:
        x: (B, N, D), any strides.
        shift, scale: (B, D), each may be None.
        weight, bias: (p·p·O, D) and (p·p·O,), the linear's; bias optional.
        grid: (h, w) with h·w = N.
        patch_size: p.
        branch, gate, branch_bias: (B, N, D), (B, D), (D,): the last residual of the model, left open for this op. The
            gate and the bias are each optional.
        norm_weight, norm_bias: (D,), the norm's own affine parameters, each optional.
        norm: "layernorm" or "rmsnorm".
        eps: added to the variance (layernorm) or to the mean square (rmsnorm).
        out_dtype: of the result; by default autocast's dtype where autocast is on, else the weight's.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own. x1 is rounded to x's dtype, the normed
    and modulated rows to the weight's for the product, and the weight to autocast's dtype where autocast is on; all else
    is in fp32.

    Returns:
        (B, O, h·p, w·p), kept for backward: where a gradient is needed, do not write into it.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    residual = (x, branch, gate, branch_bias)
    vectors = (shift, scale, norm_weight, norm_bias)
    registry.refuse_forward_ad("final_layer", *residual, *vectors, weight, bias)
    weight = weight.to(registry.autocast_dtype(x) or weight.dtype)
    out_dtype = out_dtype or weight.dtype
    checks.dtype("out_dtype", out_dtype)
    out, _, _ = torch.ops.ditkernels.final_layer(
        *(*residual, *vectors, weight, bias, *grid, patch_size, norm, eps),
        torch.promote_types(out_dtype, weight.dtype),
    )
    return out.to(out_dtype)


# ------------------------------------------------------------------------------------------------------------------
# Checks and fake kernels
# ------------------------------------------------------------------------------------------------------------------


def _check_grid(name: str, tokens: Tensor, grid_h: int, grid_w: int, patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size: got {patch_size}, allowed is 1 or more")
    if grid_h < 0 or grid_w < 0 or grid_h * grid_w != tokens.shape[1]:
        raise ValueError(f"grid: got ({grid_h}, {grid_w}), but {name} has {tokens.shape[1]} tokens")


def _check_values_per_patch(name: str, value: Tensor, axis: int, patch_size: int) -> None:
    if value.shape[axis] % (patch_size * patch_size):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; axis {axis} must be a multiple of"
            f" patch_size² = {patch_size * patch_size}"
        )


def _check_unpatchify(tokens: Tensor, grid_h: int, grid_w: int, patch_size: int) -> None:
    checks.tokens("tokens", tokens)
    _check_grid("tokens", tokens, grid_h, grid_w, patch_size)
    _check_values_per_patch("tokens", tokens, 2, patch_size)


def _check_unpatchify_backward(dout: Tensor, patch_size: int) -> None:
    checks.tensor("dout", dout, (None, None, None, None), dout)
    token_grid("dout", dout, patch_size)


def _check_tensors(
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
) -> None:
    batch, _, width = checks.tokens("x", x)
    checks.optional("branch", branch, tuple(x.shape), x)
    checks.requires("gate", gate, "branch", branch)
    checks.requires("branch_bias", branch_bias, "branch", branch)
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        checks.optional(name, vector, (batch, width), x)
    for name, vector in (
        ("branch_bias", branch_bias),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
    ):
        checks.optional(name, vector, (width,), x)
    checks.tensor("weight", weight, (None, width), x)
    checks.optional("bias", bias, (weight.shape[0],), x)


def _check_final_layer(*arguments: Any) -> None:
    *tensors, grid_h, grid_w, patch_size, norm, eps, out_dtype = arguments
    _check_tensors(*tensors)
    x, weight = tensors[0], tensors[8]
    _check_grid("x", x, grid_h, grid_w, patch_size)
    _check_values_per_patch("weight", weight, 0, patch_size)
    checks.norm(norm, eps)
    checks.dtype("out_dtype", out_dtype)
    _check_as_wide_as_the_weight("out_dtype", out_dtype, weight)


def _check_as_wide_as_the_weight(name: str, dtype: torch.dtype, weight: Tensor) -> None:
    if torch.promote_types(dtype, weight.dtype) != dtype:
        raise TypeError(
            f"{name}: got dtype {dtype}, allowed are those that hold every {weight.dtype}, the weight's dtype"
        )


def _check_final_layer_backward(dout: Tensor, out: Tensor, *arguments: Any) -> None:
    *tensors, mean, rstd, grid_h, grid_w, patch_size, norm = arguments
    x, weight = tensors[0], tensors[8]
    _check_final_layer(
        *tensors, grid_h, grid_w, patch_size, norm, 0.0, torch.promote_types(dout.dtype, weight.dtype)
    )
    image = _image_shape(x, weight, grid_h, grid_w, patch_size)
    checks.tensor("dout", dout, image, x)
    checks.tensor("out", out, image, x)
    _check_as_wide_as_the_weight("out", out.dtype, weight)
    checks.tensor("mean", mean, _mean_shape(x, norm), x)
    checks.tensor("rstd", rstd, tuple(x.shape[:2]), x)


def _image_shape(x: Tensor, weight: Tensor, grid_h: int, grid_w: int, patch_size: int) -> tuple[int, ...]:
    channels = weight.shape[0] // (patch_size * patch_size)
    return x.shape[0], channels, grid_h * patch_size, grid_w * patch_size


def _mean_shape(x: Tensor, norm: str) -> tuple[int, ...]:
    return (0,) if norm == "rmsnorm" else tuple(x.shape[:2])


def _fake_unpatchify(tokens, grid_h, grid_w, patch_size):  # type: ignore[no-untyped-def]
    channels = tokens.shape[2] // (patch_size * patch_size)
    return tokens.new_empty((tokens.shape[0], channels, grid_h * patch_size, grid_w * patch_size))


def _fake_unpatchify_backward(dout, patch_size):  # type: ignore[no-untyped-def]
    batch, channels, height, width = dout.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    return dout.new_empty((batch, grid_h * grid_w, patch_size * patch_size * channels))


def _fake_final_layer(*arguments):  # type: ignore[no-untyped-def]
    *tensors, grid_h, grid_w, patch_size, norm, _, out_dtype = arguments
    x, weight = tensors[0], tensors[8]
    statistics = accumulator(x)
    return (
        x.new_empty(_image_shape(x, weight, grid_h, grid_w, patch_size), dtype=out_dtype),
        x.new_empty(_mean_shape(x, norm), dtype=statistics),
        x.new_empty(x.shape[:2], dtype=statistics),
    )


def _fake_final_layer_backward(dout, out, x, branch, gate, *arguments):  # type: ignore[no-untyped-def]
    branch_bias, shift, scale, norm_weight, norm_bias, weight, bias = arguments[:7]
    dbranch = adaln.empty_like_or_none(branch if gate is not None else None, x)
    vectors = (gate, branch_bias, shift, scale, norm_weight, norm_bias, weight, bias)
    return (x.new_empty(x.shape), dbranch, *(adaln.empty_like_or_none(v, x) for v in vectors))


# ------------------------------------------------------------------------------------------------------------------
# Declarations
# ------------------------------------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor x, Tensor? branch, Tensor? gate, Tensor? branch_bias, Tensor? shift, Tensor? scale,"
    " Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias"
)
_GRID = "int grid_h, int grid_w, int patch_size"

UNPATCHIFY = registry.declare(
    "unpatchify", f"(Tensor tokens, {_GRID}) -> Tensor", check=_check_unpatchify, fake=_fake_unpatchify
)
UNPATCHIFY_BACKWARD = registry.declare(
    "unpatchify_backward",
    "(Tensor dout, int patch_size) -> Tensor",
    check=_check_unpatchify_backward,
    fake=_fake_unpatchify_backward,
)
FINAL_LAYER = registry.declare(
    "final_layer",
    f"({_TENSORS}, {_GRID}, str norm, float eps, ScalarType out_dtype)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    check=_check_final_layer,
    fake=_fake_final_layer,
)
FINAL_LAYER_BACKWARD = registry.declare(
    "final_layer_backward",
    f"(Tensor dout, Tensor out, {_TENSORS}, Tensor mean, Tensor rstd, {_GRID}, str norm) -> (Tensor dx, Tensor dbranch,"
    " Tensor dgate, Tensor dbranch_bias, Tensor dshift, Tensor dscale, Tensor dnorm_weight, Tensor dnorm_bias,"
    " Tensor dweight, Tensor dbias)",
    check=_check_final_layer_backward,
    fake=_fake_final_layer_backward,
)

# ------------------------------------------------------------------------------------------------------------------
# Autograd and FLOPs
# ------------------------------------------------------------------------------------------------------------------


def _setup_unpatchify(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.patch_size = inputs[3]


def _backward_unpatchify(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return UNPATCHIFY_BACKWARD.call(dout, ctx.patch_size), None, None, None


def _setup_final_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, grid_h, grid_w, patch_size, norm, _, _ = inputs
    out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(out, *tensors, mean, rstd)
    ctx.options = (grid_h, grid_w, patch_size, norm)


def _backward_final_layer(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    arguments = ctx.saved_tensors[1:11]
    dx, dbranch, *rest = FINAL_LAYER_BACKWARD.call(dout, *ctx.saved_tensors, *ctx.options)
    branch, gate = arguments[1:3]
    if branch is not None and gate is None:
        dbranch = dx.to(branch.dtype)
    grads = map(adaln.present, (dx, dbranch, *rest), arguments)
    return (*grads, *[None] * 6)


registry.differentiate(UNPATCHIFY, _setup_unpatchify, _backward_unpatchify)
registry.differentiate(FINAL_LAYER, _setup_final_layer, _backward_final_layer)
for _op in (UNPATCHIFY_BACKWARD, FINAL_LAYER_BACKWARD):
    registry.refuse_double_backward(_op)


def _flops(*arguments: Any, out_val: Any = None, **options: Any) -> int:
    (batch, tokens, width), weight = arguments[0], arguments[8]
    return 2 * batch * tokens * width * weight[0]


def _flops_backward(
    dout: torch.Size, out: torch.Size, *arguments: Any, out_val: Any = None, **options: Any
) -> int:
    return 2 * _flops(*arguments)


registry.register_flops(FINAL_LAYER, _flops)
registry.register_flops(FINAL_LAYER_BACKWARD, _flops_backward)

# ------------------------------------------------------------------------------------------------------------------
# The torch backend: the formulas at the top of this file
# ------------------------------------------------------------------------------------------------------------------


def _torch_unpatchify(tokens: Tensor, grid_h: int, grid_w: int, patch_size: int) -> Tensor:
    batch, _, values = tokens.shape
    p, channels = patch_size, values // (patch_size * patch_size)
    patches = tokens.reshape(batch, grid_h, grid_w, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    image = patches.clone(memory_format=torch.contiguous_format)
    return image.view(batch, channels, grid_h * p, grid_w * p)


def _torch_unpatchify_backward(dout: Tensor, patch_size: int) -> Tensor:
    batch, channels, height, width = dout.shape
    p, grid_h, grid_w = patch_size, height // patch_size, width // patch_size
    patches = dout.reshape(batch, channels, grid_h, p, grid_w, p).permute(0, 2, 4, 3, 5, 1)
    tokens = patches.clone(memory_format=torch.contiguous_format)
    return tokens.view(batch, grid_h * grid_w, p * p * channels)


def _stream(x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    return x if branch is None else adaln.residual_forward(x, branch, gate, branch_bias)


def _torch_final_layer(
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
    wide = accumulator(weight)
    stream = _stream(x, branch, gate, branch_bias)
    rows, mean, rstd = adaln.norm_forward(stream, shift, scale, norm_weight, norm_bias, norm, eps)
    tokens = product(rows.to(weight.dtype).to(wide), weight.to(wide).t())
    if bias is not None:
        tokens = tokens + bias.to(wide)
    return _torch_unpatchify(tokens.to(out_dtype), grid_h, grid_w, patch_size), mean, rstd


def _normed(stream: Tensor, mean: Tensor, rstd: Tensor, norm: str) -> Tensor:
    """x̂ again, from the saved mean and rstd."""
    wide = accumulator(stream)
    centred = stream.to(wide) if norm == "rmsnorm" else stream.to(wide) - mean.unsqueeze(-1)
    return centred * rstd.unsqueeze(-1)


def _affine(
    rows: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Tensor:
    """(rows·norm_weight + norm_bias)·(1 + scale) + shift, (B, N, D), in the order of ``adaln.norm_forward``."""
    if norm_weight is not None:
        rows = rows * norm_weight.to(rows.dtype)
    if norm_bias is not None:
        rows = rows + norm_bias.to(rows.dtype)
    if scale is not None:
        rows = rows * (1 + scale.to(rows.dtype).unsqueeze(1))
    return rows if shift is None else rows + shift.to(rows.dtype).unsqueeze(1)


def _torch_final_layer_backward(
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
    wide = accumulator(weight)
    batch, _, width = x.shape
    wide_weight = weight.to(wide).contiguous()
    stream = _stream(x, branch, gate, branch_bias)
    normed = _normed(stream, mean, rstd, norm)
    dz = _torch_unpatchify_backward(dout, patch_size).to(wide)
    z = _torch_unpatchify_backward(out, patch_size).to(wide)

    rows = _affine(normed, shift, scale, norm_weight, norm_bias).to(weight.dtype).to(wide)
    dweight = product(dz.flatten(0, 1).t(), rows.flatten(0, 1)).to(weight.dtype)
    dbias = None if bias is None else dz.sum((0, 1)).to(bias.dtype)

    a = _affine(wide_weight.new_ones(batch, 1, width), None, scale, norm_weight, None)
    origin = _affine(wide_weight.new_zeros(batch, 1, width), shift, scale, None, norm_bias)
    slope, offset = product(a, wide_weight.t()), product(origin, wide_weight.t())
    if bias is not None:
        offset = offset + bias.to(wide)
    drows = product(dz, wide_weight)
    dx = drows * a - normed * (dz * (z - offset)).sum(-1, keepdim=True) / width
    if norm == "layernorm":
        dx = dx - (dz * slope).sum(-1, keepdim=True) / width
    dx = dx * rstd.unsqueeze(-1)

    p, q = drows.sum(1), (drows * normed).sum(1)
    vectors = adaln.norm_vector_gradients(p, q, shift, scale, norm_weight, norm_bias)
    residual = (None,) * 3 if branch is None else adaln.residual_backward(dx, branch, gate, branch_bias)
    grads = (dx.to(x.dtype), *residual, *vectors, dweight, dbias)
    gated = None if gate is None else branch
    inputs = (x, gated, gate, branch_bias, shift, scale, norm_weight, norm_bias, weight, bias)
    return tuple(
        x.new_empty(0) if value is None or grad is None else grad for value, grad in zip(inputs, grads)
    )


registry.implement(UNPATCHIFY, "torch", _torch_unpatchify)
registry.implement(UNPATCHIFY_BACKWARD, "torch", _torch_unpatchify_backward)
registry.implement(FINAL_LAYER, "torch", _torch_final_layer)
registry.implement(FINAL_LAYER_BACKWARD, "torch", _torch_final_layer_backward)
