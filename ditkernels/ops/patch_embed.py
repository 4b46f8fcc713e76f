"""Latents to tokens: ``patch_embed``, a p x p convolution with stride p, its bias, and the positions, in one op.

The patches do not overlap, so the convolution is one product. With u the patch of token n in sample b, its C·p·p values
in the weight's order (channel, row, column) and rounded to the weight's dtype, and W the weight as a (D, C·p·p) matrix:

    y_bn = W · u_bn + bias + pos_n                                   accumulated in fp32 (fp64 for fp64), rounded once

Backward, from dy:

    dW = Σ_bn dy_bn ⊗ u_bn      dbias = Σ_bn dy_bn      dpos_n = Σ_b dy_bn      du_bn = Wᵀ · dy_bn

and dx is du put back where the patches came from. Saved for backward: x and the weight. The gradients of x and of the
positions are computed only where they are asked for: a training step wants neither, since latents are data and DiT's
positions are constants.

Patch embedding: Dosovitskiy et al., arXiv 2010.11929; in DiT: Peebles & Xie, arXiv 2212.09748.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _checks as checks
from ditkernels.ops import _registry as registry
from ditkernels.ops.adaln import accumulator

# ------------------------------------------------------------------------------------------------------------------
# Public function
# ------------------------------------------------------------------------------------------------------------------


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """p x p convolution with stride p, flattened to tokens in row-major order, plus bias and positions.

    Args:
        x: (B, C, H, W) latents, any strides; H and W multiples of p.
        weight: (D, C, p, p), a convolution's.
        bias: (D,), optional.
        pos_embed: (N, D) or (1, N, D) with N = (H/p)·(W/p), optional.
        out_dtype: of the tokens; by default what plain PyTorch would give: x's dtype, or autocast's where autocast is
            on, promoted with the dtype of ``pos_embed``.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own. x is rounded to the weight's dtype for
    the product, and the weight to autocast's dtype where autocast is on; all else is in fp32.

    Returns:
        (B, N, D).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    registry.refuse_forward_ad("patch_embed", x, weight, bias, pos_embed)
    lowered = registry.autocast_dtype(x)
    if out_dtype is None:
        out_dtype = lowered or x.dtype
        if pos_embed is not None:
            out_dtype = torch.promote_types(out_dtype, pos_embed.dtype)
    return torch.ops.ditkernels.patch_embed(x, weight.to(lowered or weight.dtype), bias, pos_embed, out_dtype)


# ------------------------------------------------------------------------------------------------------------------
# Checks and fake kernels
# ------------------------------------------------------------------------------------------------------------------


def token_grid(name: str, image: Tensor, patch_size: int) -> tuple[int, int]:
    """The grid (h, w) of an image (B, C, H, W); raises ValueError on a size that is no multiple of the patch size."""
    if patch_size < 1:
        raise ValueError(f"patch_size: got {patch_size}, allowed is 1 or more")
    height, width = image.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"{name}: got size {height} x {width}, not divisible by the patch size {patch_size}")
    return height // patch_size, width // patch_size


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, out_dtype: torch.dtype
) -> None:
    checks.tensor("x", x, (None, None, None, None), x)
    checks.tensor("weight", weight, (None, x.shape[1], None, None), x)
    hidden, _, rows, columns = weight.shape
    if rows != columns:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; the patch must be square")
    grid_h, grid_w = token_grid("x", x, rows)
    checks.optional("bias", bias, (hidden,), x)
    if pos_embed is not None:
        leading = (1,) if pos_embed.dim() == 3 else ()
        checks.tensor("pos_embed", pos_embed, (*leading, grid_h * grid_w, hidden), x)
    checks.dtype("out_dtype", out_dtype)


def _check_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    needs: list[bool],
) -> None:
    _check(x, weight, bias, pos_embed, dy.dtype)
    checks.tensor("dy", dy, _out_shape(x, weight), x)
    if len(needs) != 4:
        raise ValueError(f"needs: got {len(needs)} values, expected 4, for x, weight, bias, pos_embed")


def _out_shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    hidden, _, patch, _ = weight.shape
    return x.shape[0], (x.shape[2] // patch) * (x.shape[3] // patch), hidden


def _fake(x, weight, bias, pos_embed, out_dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(_out_shape(x, weight), dtype=out_dtype)


def _fake_backward(dy, x, weight, bias, pos_embed, needs):  # type: ignore[no-untyped-def]
    inputs = (x, weight, bias, pos_embed)
    return tuple(
        x.new_empty(0) if value is None or not needed else value.new_empty(value.shape)
        for value, needed in zip(inputs, needs)
    )


# ------------------------------------------------------------------------------------------------------------------
# Declarations and autograd
# ------------------------------------------------------------------------------------------------------------------

PATCH_EMBED = registry.declare(
    "patch_embed",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? pos_embed, ScalarType out_dtype) -> Tensor",
    check=_check,
    fake=_fake,
)
PATCH_EMBED_BACKWARD = registry.declare(
    "patch_embed_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? pos_embed, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dpos_embed)",
    check=_check_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    grads = PATCH_EMBED_BACKWARD.call(dy, *ctx.saved_tensors, needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs)), None)


registry.differentiate(PATCH_EMBED, _setup, _backward)
registry.refuse_double_backward(PATCH_EMBED_BACKWARD)


def _flops(
    x: torch.Size, weight: torch.Size, *_: Any, out_val: torch.Size | None = None, **options: Any
) -> int:
    batch, channels, height, width = x
    return 2 * batch * height * width * channels * weight[0]


def _flops_backward(
    dy: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    pos_embed: torch.Size | None,
    needs: list[bool],
    out_val: Any = None,
    **options: Any,
) -> int:
    return _flops(x, weight) * (needs[0] + needs[1])


registry.register_flops(PATCH_EMBED, _flops)
registry.register_flops(PATCH_EMBED_BACKWARD, _flops_backward)

# ------------------------------------------------------------------------------------------------------------------
# The torch backend: the formulas at the top of this file
# ------------------------------------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype a and b have: inside an op, autocast would round what was widened on purpose."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _patches(x: Tensor, weight: Tensor) -> Tensor:
    """The patches of x as rows, (B, N, C·p·p), rounded to the weight's dtype, in the accumulation dtype."""
    batch, channels, height, width = x.shape
    p = weight.shape[-1]
    grid_h, grid_w = height // p, width // p
    patches = x.to(weight.dtype).to(accumulator(weight)).reshape(batch, channels, grid_h, p, grid_w, p)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid_h * grid_w, channels * p * p)


def _image(patches: Tensor, like: Tensor, p: int) -> Tensor:
    """The inverse of ``_patches``, as a new tensor in the shape and dtype of ``like``."""
    batch, channels, height, width = like.shape
    tiles = patches.to(like.dtype).reshape(batch, height // p, width // p, channels, p, p)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(like.shape).contiguous()


def _torch_patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    wide = accumulator(weight)
    y = product(_patches(x, weight), weight.to(wide).flatten(1).t())
    if bias is not None:
        y = y + bias.to(wide)
    if pos_embed is not None:
        y = y + pos_embed.to(wide)
    return y.to(out_dtype)


def _torch_patch_embed_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    wide = accumulator(weight)
    dy = dy.to(wide)
    dx, dweight, dbias, dpos = (x.new_empty(0) for _ in range(4))
    if needs[0]:
        dx = _image(product(dy, weight.to(wide).flatten(1)), x, weight.shape[-1])
    if needs[1]:
        dweight = product(dy.flatten(0, 1).t(), _patches(x, weight).flatten(0, 1))
        dweight = dweight.reshape(weight.shape).to(weight.dtype)
    if needs[2] and bias is not None:
        dbias = dy.sum((0, 1)).to(bias.dtype)
    if needs[3] and pos_embed is not None:
        dpos = dy.sum(0).reshape(pos_embed.shape).to(pos_embed.dtype)
    return dx, dweight, dbias, dpos


registry.implement(PATCH_EMBED, "torch", _torch_patch_embed)
registry.implement(PATCH_EMBED_BACKWARD, "torch", _torch_patch_embed_backward)
