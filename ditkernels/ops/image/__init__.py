"""From latents to tokens and back: ``patch_embed``, ``final_layer``, ``unpatchify``, and the gather ``patchify``.

A patch holds p x p pixels of all channels; token n = i·w + j of a grid (h, w) is the patch at (i·p, j·p). Its values are ordered
(channel, row, column) on the way in (``channels_first``), as in a convolution's weight, and (row, column, channel) on the way
out, as in the public checkpoints. ``patchify`` gathers an image's patches as rows, ``unpatchify`` puts rows back as patches. Each
moves every value once, and each is the other's gradient. Compiled kernels compute in fp32.

``patch_embed`` is a p x p convolution with stride p, and as patches do not overlap, one product. With u the rows of ``patchify``,
rounded to the weight's dtype, and W the weight as a (D, C·p·p) matrix,

    y_bn = W · u_bn + bias + pos_n

    dW = Σ_bn dy_bn ⊗ u_bn      dbias = Σ_bn dy_bn      dpos_n = Σ_b dy_bn      dx = unpatchify(Wᵀ · dy)

``final_layer`` is the model's last residual, norm, modulation, linear and ``unpatchify``; x1 and h are those of norm/__init__.py:

    x1 = x + gate · (branch + branch_bias)      rounded to x's dtype; without a branch x1 = x
    h  = norm(x1) · (1 + scale) + shift         rounded to the weight's dtype
    z  = W · h + bias                           out = unpatchify(z)

    dz = patchify(dout)      dW = Σ_bn dz_bn ⊗ h_bn      dbias = Σ_bn dz_bn      dh = Wᵀ · dz

and dh goes through the backward of ``modulate_norm`` or ``gated_residual_norm``. Forward each layer is one kernel. Backward is made
of other ops and of products in the dtypes of what was saved: the two layers are 0.14% of a training step. Saved for backward are
inputs alone, as far as the wanted gradients need them; x1, h and the statistics of the rows are computed again.

Patch embedding: Dosovitskiy et al., arXiv 2010.11929; both layers in DiT: Peebles & Xie, arXiv 2212.09748.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import _native
from ditkernels.ops.dispatch import Op, Refusal, Whole, declare, refuse_forward_ad, without_autocast
from ditkernels.ops.norm import GATED_RESIDUAL, GATED_RESIDUAL_NORM, MODULATE_NORM, norm_forward, residual_forward
from ditkernels.ops.spec import Example, Given, Gradient, Sizes, Wanted, accumulator, check_comes_with, check_norm, check_tensor
from ditkernels.reference import is_dtensor, transformed

__all__ = ["final_layer", "patch_embed", "unpatchify"]

Gradients = tuple[Tensor | None, ...]

# ---- Public functions ------------------------------------------------------------------------------------------------


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None, *, out_dtype: torch.dtype | None = None
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
    the product, and the weight to autocast's dtype where autocast is on; all else is in fp32 in compiled kernels, and on the
    ``torch`` backend as in plain PyTorch.

    Returns:
        (B, N, D).

    Raises:
        ValueError, TypeError: a shape, dtype, device or kind of tensor that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    lowered = PATCH_EMBED.autocast_dtype(x)
    if out_dtype is None:
        out_dtype = lowered or x.dtype
        if isinstance(pos_embed, Tensor):
            out_dtype = torch.promote_types(out_dtype, pos_embed.dtype)
    if isinstance(pos_embed, Tensor) and pos_embed.dim() == 2:
        pos_embed = pos_embed.unsqueeze(0)
    return PATCH_EMBED((x, weight.to(lowered or weight.dtype), bias, pos_embed), (out_dtype,))  # type: ignore[no-any-return]


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
        As ``patch_embed``.
    """
    return UNPATCHIFY((tokens,), (*grid, patch_size, False))  # type: ignore[no-any-return]


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
    is in fp32 in compiled kernels, and on the ``torch`` backend as in plain PyTorch. Where x needs no gradient, fewer rows are
    saved: with all of the residual frozen, norm and linear run one after the other and save what lies between them, the rows
    that plain PyTorch saves; with x alone frozen, the residual is closed before the layer. A compiled graph keeps the op.

    Returns:
        (B, O, h·p, w·p).

    Raises:
        As ``patch_embed``.
    """
    lowered = FINAL_LAYER.autocast_dtype(x)
    weight = weight.to(lowered or weight.dtype)
    residual, vectors = (branch, gate, branch_bias), (shift, scale, norm_weight, norm_bias)
    tensors = (x, *residual, *vectors, weight, bias)
    options = (*grid, patch_size, norm, eps, out_dtype or weight.dtype)
    if not (_needs_gradient(x) or torch.compiler.is_compiling() or transformed()):
        if any(map(_needs_gradient, residual)):
            FINAL_LAYER.declaration.checked((*tensors, *options))
            tensors = (GATED_RESIDUAL((x, *residual)), None, None, None, *vectors, weight, bias)
        elif any(map(_needs_gradient, (*vectors, weight))):
            return _behind_frozen_rows(tensors, options)
    return FINAL_LAYER(tensors, options)  # type: ignore[no-any-return]


def _needs_gradient(tensor: Tensor | None) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()


def _behind_frozen_rows(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """``final_layer`` where no row needs a gradient; saves h for the weight, and the normed rows for the vectors of the norm."""
    refuse_forward_ad("final_layer", *tensors)
    FINAL_LAYER.declaration.checked((*tensors, *options))
    x, branch, gate, branch_bias, shift, scale, norm_weight, norm_bias, weight, bias = tensors
    *grid, patch_size, norm, eps, out_dtype = options
    adaptive, affine = (shift, scale), (norm_weight, norm_bias)
    of_vectors = any(map(_needs_gradient, (*adaptive, *affine)))
    if of_vectors:
        adaptive = affine = (None, None)
    chosen = (norm, eps, x.dtype if of_vectors else weight.dtype)
    if branch is None:
        h = MODULATE_NORM((x, *adaptive, *affine), chosen)
    else:
        _, h = GATED_RESIDUAL_NORM((x, branch, gate, *adaptive, branch_bias, *affine), chosen)
    if of_vectors:
        h = h if norm_weight is None else h * norm_weight
        h = h if norm_bias is None else h + norm_bias
        h = reference.modulate(h, shift, scale).to(weight.dtype)
    z = _Linear.apply(weight, h, torch.promote_types(weight.dtype, out_dtype))
    z = (z if bias is None else z + bias).to(out_dtype)
    return UNPATCHIFY((z,), (*grid, patch_size, False))  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """h · Wᵀ, computed in ``dtype``, for a weight of h's dtype."""

    @staticmethod
    def forward(weight: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        return product(h.to(dtype), weight.to(dtype).t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, h, _ = inputs
        of_weight, of_h, _ = ctx.needs_input_grad
        ctx.save_for_backward(weight if of_h else None, h if of_weight else None)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        weight, h = ctx.saved_tensors
        dweight = None if h is None else _of_weight(dz, h).to(h.dtype)
        return dweight, None if weight is None else product(dz, weight).to(weight.dtype), None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype that holds both. Autocast would round what was widened on purpose."""
    dtype, device = torch.promote_types(a.dtype, b.dtype), a.device.type
    a, b = a.to(dtype), b.to(dtype)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return a @ b
    with torch.autocast(device, enabled=False):
        return a @ b


def _of_weight(dz: Tensor, rows: Tensor) -> Tensor:
    """Σ_bn dz_bn ⊗ rows_bn. Of DTensors sample by sample: torch does not flatten samples and tokens that are sharded."""
    if is_dtensor(dz):
        return product(dz.transpose(1, 2), rows).sum(0)
    return product(dz.flatten(0, 1).t(), rows.flatten(0, 1))


# ---- Gradients, made of other ops ------------------------------------------------------------------------------------


def _patch_embed_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Gradients:
    (dy,), (x, weight) = grads, read
    of_x, of_weight, of_bias, of_pos = wanted
    dx = dweight = dbias = dpos = None
    if of_x:
        p, du = weight.shape[-1], product(dy, weight.flatten(1)).to(of_x)
        dx = call.run(UNPATCHIFY, du, x.shape[2] // p, x.shape[3] // p, p, True)
    if of_weight:
        u = call.run(PATCHIFY, x, weight.shape[-1], True, weight.dtype)
        dweight = _of_weight(dy, u).view(weight.shape).to(of_weight)
    if of_bias:
        dbias = dy.sum((0, 1), dtype=accumulator(dy)).to(of_bias)
    if of_pos:
        dpos = dy.sum(0, keepdim=True, dtype=accumulator(dy)).to(of_pos)
    return dx, dweight, dbias, dpos


def _unpatchify_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Gradients:
    *_, patch_size, channels_first = options
    return (call.run(PATCHIFY, *grads, patch_size, channels_first, *wanted),)


def _patchify_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Gradients:
    (dtokens,), (image,), (of_image,) = grads, read, wanted
    patch_size, channels_first, _ = options
    grid = (size // patch_size for size in image.shape[2:])
    return (call.run(UNPATCHIFY, dtokens.to(of_image), *grid, patch_size, channels_first),)


def _final_layer_gradients(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Gradients:
    """Those of the rows come from the norm family; what the wanted ones do not need is absent in ``read``."""
    (dout,) = grads
    x, branch, gate, branch_bias, shift, scale, norm_weight, norm_bias, weight = read
    grid_h, grid_w, patch_size, norm, eps, _ = options
    of_x, of_branch, of_gate, of_branch_bias, *of_norm, of_weight, of_bias = wanted
    through_rows = any(wanted[:8])
    dbias = None if of_bias is None else _bias_gradient(dout, grid_h, grid_w, patch_size).to(of_bias)
    if not through_rows and of_weight is None:
        return (*[None] * 9, dbias)

    dtype = of_weight if weight is None else weight.dtype
    chosen = (norm, eps, dtype)
    x1 = h = stats = dweight = None  # type: Any
    if branch is not None:
        vectors = (gate, shift, scale, branch_bias, norm_weight, norm_bias)
        x1, h, stats = call.run(GATED_RESIDUAL_NORM, x, branch, *vectors, *chosen, through_rows)
    elif x is not None:
        affine = (shift, scale, norm_weight, norm_bias)
        x1, (h, stats) = x, call.run(MODULATE_NORM, x, *affine, *chosen, through_rows)
    dz = call.run(PATCHIFY, dout, patch_size, False, dtype)
    if of_weight is not None:
        dweight = _of_weight(dz, h)
    if not through_rows:
        return (*[None] * 8, dweight, dbias)

    dh = product(dz, weight)
    if branch is None:
        norm_reads = (x1, scale, norm_weight, norm_bias, stats)
        dx, *dnorm = call.differentiate(MODULATE_NORM, chosen, (dh,), norm_reads, (of_x, *of_norm))
        return (dx, None, None, None, *dnorm, dweight, dbias)
    reads = (x1, branch, gate, scale, branch_bias, norm_weight, norm_bias, stats)
    of_shift, of_scale, *of_affine = of_norm
    asked = (of_x, of_branch, of_gate, of_shift, of_scale, of_branch_bias, *of_affine)
    made = call.differentiate(GATED_RESIDUAL_NORM, chosen, (None, dh), reads, asked)
    dx, dbranch, dgate, dshift, dscale, dbranch_bias, *daffine = made
    return (dx, dbranch, dgate, dbranch_bias, dshift, dscale, *daffine, dweight, dbias)


def _bias_gradient(dout: Tensor, grid_h: int, grid_w: int, patch_size: int) -> Tensor:
    """The sum of dz over tokens and samples, in the accumulation dtype, straight from the image."""
    patches = dout.unflatten(3, (grid_w, patch_size)).unflatten(2, (grid_h, patch_size))
    return patches.sum((0, 2, 4), dtype=accumulator(dout)).permute(1, 2, 0).flatten()


# ---- Checks and sizes: what the letters of a declaration do not say --------------------------------------------------


def _check_patch_size(patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size: got {patch_size}, allowed is 1 or more")


def _check_divisible(name: str, image: Tensor, patch_size: int) -> None:
    _check_patch_size(patch_size)
    height, width = image.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"{name}: got size {height} x {width}, not divisible by the patch size {patch_size}")


def _check_grid(given: Given, name: str, values_of: str, axis: int) -> None:
    """That the tokens ``name`` fill the grid, and that an axis of ``values_of`` has the values of a patch."""
    grid_h, grid_w, p = given["grid_h"], given["grid_w"], given["patch_size"]
    _check_patch_size(p)
    length, shape = given[name].shape[1], tuple(given[values_of].shape)
    if grid_h < 0 or grid_w < 0 or grid_h * grid_w != length:
        raise ValueError(f"grid: got ({grid_h}, {grid_w}), but {name} has {length} tokens")
    if shape[axis] % (p * p):
        raise ValueError(f"{values_of}: got shape {shape}; axis {axis} must be a multiple of patch_size² = {p * p}")


def _check_patch_embed(given: Given) -> None:
    x, weight, pos_embed = given["x"], given["weight"], given["pos_embed"]
    width, _, rows, columns = weight.shape
    if rows != columns:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; the patch must be square")
    _check_divisible("x", x, rows)
    if pos_embed is not None:
        check_tensor("pos_embed", pos_embed, (1, _length(x, rows), width), x)


def _check_final_layer(given: Given) -> None:
    check_comes_with(given, "gate", "branch")
    check_comes_with(given, "branch_bias", "branch")
    _check_grid(given, "x", "weight", 0)
    check_norm(given)


def _length(image: Tensor, patch_size: int) -> int:
    return (image.shape[2] // patch_size) * (image.shape[3] // patch_size)


def _image_sizes(given: Given, sizes: Sizes) -> Sizes:
    p = given["patch_size"]
    return {"O": sizes["V"] // (p * p), "H": given["grid_h"] * p, "W": given["grid_w"] * p}


def _token_sizes(given: Given, sizes: Sizes) -> Sizes:
    p = given["patch_size"]
    return {"N": _length(given["image"], p), "V": sizes["O"] * p * p}


# ---- What the ops mean, in plain PyTorch, whose products take one dtype ----------------------------------------------


def _unpatchify_meant(tokens: Tensor, grid_h: int, grid_w: int, patch_size: int, channels_first: bool) -> Tensor:
    if channels_first:
        tokens = tokens.unflatten(2, (-1, patch_size**2)).transpose(2, 3).flatten(2)
    return reference.unpatchify(tokens, grid=(grid_h, grid_w), patch_size=patch_size)


def _patch_embed_meant(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return reference.patch_embed(x.to(weight.dtype), weight, bias, pos_embed, out_dtype=out_dtype)


def _final_layer_meant(weight: Tensor, bias: Tensor | None, grid_h: int, grid_w: int, **rest: Any) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return reference.final_layer(weight=weight, bias=bias, grid=(grid_h, grid_w), **rest)


# ---- Declarations ----------------------------------------------------------------------------------------------------

_TOKENS = {"B": 3, "N": 15, "D": 45, "V": 12}
_GRID = {"grid": (3, 5), "patch_size": 2}
_NO_ADALN = {"shift": None, "scale": None}

PATCHIFY = declare(
    "patchify",
    inputs="image: BOHW",
    options="patch_size: int, channels_first: bool, dtype: ScalarType",
    outputs="tokens: BNV = dtype",
    sizes=_token_sizes,
    shards="B",
    check=lambda given: _check_divisible("image", given["image"], given["patch_size"]),
    gradient=Gradient(reads="image", needs={"image": "image"}, formula=_patchify_gradients, by_op=False),
)
UNPATCHIFY = declare(
    "unpatchify",
    inputs="tokens: BNV",
    options="grid_h: int, grid_w: int, patch_size: int, channels_first: bool",
    outputs="image: BOHW = tokens",
    sizes=_image_sizes,
    shards="B",
    check=lambda given: _check_grid(given, "tokens", "tokens", 2),
    meaning=_unpatchify_meant,
    gradient=Gradient(reads="", needs={}, formula=_unpatchify_gradients, by_op=False),
    examples=(Example(_TOKENS, _GRID),),
)
PATCH_EMBED = declare(
    "patch_embed",
    inputs="x: BCHW, weight: ECPQ, bias: E?, pos_embed: LNE?",
    options="out_dtype: ScalarType",
    outputs="y: BNE = out_dtype",
    sizes=lambda given, sizes: {"N": _length(given["x"], sizes["P"])},
    check=_check_patch_embed,
    shards="BE",
    flops=lambda given: 2 * given["x"].numel() * given["weight"][0],
    meaning=_patch_embed_meant,
    # Of x and of the weight one gradient needs the values, the other the shape.
    gradient=Gradient(reads="x weight", needs={"x weight": "x weight"}, formula=_patch_embed_gradients, by_op=False),
    examples=(
        Example({"B": 3, "C": 3, "H": 6, "W": 10, "P": 2, "Q": 2, "E": 45, "L": 1, "N": 15}),
        Example({"B": 3, "C": 4, "H": 12, "W": 4, "P": 4, "Q": 4, "E": 45}, present=""),
    ),
)
FINAL_LAYER = declare(
    "final_layer",
    inputs=(
        "x: BND, branch: BND?, gate: BD?, branch_bias: D?, shift: BD?, scale: BD?, norm_weight: D?, norm_bias: D?,"
        " weight: VD, bias: V?"
    ),
    options="grid_h: int, grid_w: int, patch_size: int, norm: str, eps: float, out_dtype: ScalarType",
    outputs="out: BOHW = out_dtype",
    sizes=_image_sizes,
    check=_check_final_layer,
    row="D",
    shards="B",
    flops=lambda given: 2 * given["x"].numel() * given["weight"][0],
    meaning=_final_layer_meant,
    gradient=Gradient(
        reads="x branch gate branch_bias shift scale norm_weight norm_bias weight",
        needs={
            "x branch gate branch_bias": "x branch gate branch_bias scale norm_weight weight",
            "shift": "weight",
            "scale": "x branch gate branch_bias norm_weight norm_bias weight",
            "norm_weight": "x branch gate branch_bias scale weight",
            "norm_bias": "scale weight",
            "weight": "x branch gate branch_bias shift scale norm_weight norm_bias",
        },
        formula=_final_layer_gradients,
        by_op=False,
    ),
    examples=(
        Example(_TOKENS, _GRID, present="shift scale bias"),
        Example(_TOKENS, _GRID, present="branch gate branch_bias shift scale bias"),
        Example({**_TOKENS, "V": 48}, {**_GRID, "patch_size": 4, **_NO_ADALN}, present="norm_weight norm_bias"),
    ),
)


# ---- The torch backend: torch's own pieces, which round where plain PyTorch rounds -----------------------------------


@PATCHIFY.implement("torch")
def _patchify(image: Tensor, patch_size: int, channels_first: bool, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = image.shape
    p, grid_h, grid_w = patch_size, height // patch_size, width // patch_size
    tiles = image.reshape(batch, channels, grid_h, p, grid_w, p)
    patches = tiles.permute((0, 2, 4, 1, 3, 5) if channels_first else (0, 2, 4, 3, 5, 1))
    copy = torch.empty(patches.shape, dtype=dtype, device=image.device).copy_(patches)
    return copy.view(batch, grid_h * grid_w, channels * p * p)


@UNPATCHIFY.implement("torch")
def _unpatchify(tokens: Tensor, grid_h: int, grid_w: int, patch_size: int, channels_first: bool) -> Tensor:
    batch, p = tokens.shape[0], patch_size
    channels = tokens.shape[2] // (p * p)
    values = (channels, p, p) if channels_first else (p, p, channels)
    tiles = tokens.reshape(batch, grid_h, grid_w, *values)
    image = tiles.permute((0, 3, 1, 4, 2, 5) if channels_first else (0, 5, 1, 3, 2, 4))
    return image.clone(memory_format=torch.contiguous_format).view(batch, channels, grid_h * p, grid_w * p)


@PATCH_EMBED.implement("torch")
def _patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    y = _linear(_patchify(x, weight.shape[-1], True, weight.dtype), weight.flatten(1), bias)
    if pos_embed is not None:
        y = torch.add(y, pos_embed, out=y if y.dtype == out_dtype else None)
    return y.to(out_dtype)


@FINAL_LAYER.implement("torch")
def _final_layer(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, grid_h: int, grid_w: int, patch_size: int, norm: str, eps: float,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x1 = x if branch is None else residual_forward(x, branch, gate, branch_bias)
    h, _ = norm_forward(x1, shift, scale, norm_weight, norm_bias, norm, eps, weight.dtype, False)
    return _unpatchify(_linear(h, weight, bias).to(out_dtype), grid_h, grid_w, patch_size, False)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's linear, on a CPU in fp32: a product as thin as these takes up to five times as long in bf16 there."""
    dtype = accumulator(weight) if rows.device.type == "cpu" else weight.dtype
    with without_autocast(rows):
        return F.linear(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def refusing_empty_weights(refuse: Refusal) -> Refusal:
    """``refuse``, and no weight without elements."""

    def refusal(op: Op, args: Any) -> str | None:
        empty = op.declaration.given(args)["weight"].numel() == 0
        return refuse(op, args) or ("the weight is empty" if empty else None)

    return refusal


for _op in (PATCH_EMBED, FINAL_LAYER):
    _op.implement_elsewhere("cuda", refuse=refusing_empty_weights(_native.refuse_cuda))
    _op.implement_elsewhere("cpu", refuse=refusing_empty_weights(_native.refuse_cpu))
for _op in (PATCHIFY, UNPATCHIFY):
    _op.implement_elsewhere("cuda", refuse=_native.refuse_cuda)
    _op.implement_elsewhere("cpu", refuse=_native.refuse_cpu)
for _op in (PATCH_EMBED, FINAL_LAYER, PATCHIFY, UNPATCHIFY):
    _op.implement_later("triton", f"{__name__}.triton")
