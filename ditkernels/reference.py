"""The specification: what every op means and what a DiT is, in plain PyTorch.

Everything else in the package is held against this file. It uses no op of the package and favours being read over being fast.
The file is long because a specification that reads from top to bottom has one place where a reader looks things up.

Shapes: B samples, N tokens, D channels, p patch size, C input channels, O output channels, (H, W) latent size,
(h, w) = (H/p, W/p) token grid, N = h·w. The vectors of a modulation (shift, scale, gate) are (B, D), or as ``of_tokens`` says.

Sources: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748) for the architecture, its four
conditioning blocks and the twelve configurations; Vaswani et al. 2017 for sinusoidal embeddings; Ho & Salimans 2022 for
classifier-free guidance. Constructor, state-dict keys and initialisation are those of the public DiT checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

NORMS = ("layernorm", "rmsnorm")
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")


# ---- Ops -------------------------------------------------------------------------------------------------------------


def normalize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layernorm",
    eps: float = 1e-6,
) -> Tensor:
    """Layer norm, or RMS norm, over the last axis, with optional affine weight and bias of shape (D,)."""
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, allowed are {', '.join(NORMS)}")
    wide = x.dtype in (torch.float32, torch.float64)
    if norm == "layernorm" and wide and weight is not None and all(v is None or v.dtype == x.dtype for v in (weight, bias)):
        # As nn.LayerNorm, which keeps no normed rows for the weight's gradient. In less than fp32 it would also sum that up there.
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.layer_norm(x, x.shape[-1:], eps=eps) if norm == "layernorm" else F.rms_norm(x, x.shape[-1:], eps=eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def of_tokens(vector: Tensor, tokens: int, index: Tensor | None = None) -> Tensor:
    """A vector of a modulation as it meets x (B, N, D): (D,), (B, 1, D) or (B, N, D).

    (D,) is shared by the batch, (B, D) is per sample, (B, S, D) per segment of N/S tokens, so that (B, N, D) is per token. With an
    index (B, N) token n of sample b takes row index[b, n] of (K, D), or row (b, index[b, n]) of (B, K, D).
    """
    if vector.dim() == 1:
        return vector
    if index is not None:
        if vector.dim() == 3:
            first = torch.arange(vector.shape[0], device=index.device) * vector.shape[1]
            index, vector = index + first.unsqueeze(1), vector.flatten(0, 1)
        return F.embedding(index, vector)
    if vector.dim() == 2:
        return vector.unsqueeze(1)
    return vector if vector.shape[1] in (1, tokens) else vector.repeat_interleave(tokens // vector.shape[1], 1)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, index: Tensor | None = None) -> Tensor:
    """x·(1 + scale) + shift for x (B, N, D), with shift and scale as ``of_tokens`` takes them."""
    if scale is not None:
        x = x * (1 + of_tokens(scale, x.shape[1], index))
    return x if shift is None else x + of_tokens(shift, x.shape[1], index)


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
    """norm(x)·(1 + scale) + shift. x: (B, N, D) -> (B, N, D) in ``out_dtype`` (default: x's); shift, scale: see ``of_tokens``."""
    return modulate(normalize(x, weight, bias, norm=norm, eps=eps), shift, scale, index).to(out_dtype or x.dtype)


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
    """x + gate·u in x's dtype, where u = branch + branch_bias, or norm(branch)·branch_weight given a ``branch_norm``.

    x, branch: (B, N, D); gate: see ``of_tokens``; branch_bias, branch_weight: (D,).
    """
    if branch_bias is not None:
        branch = branch + branch_bias
    if branch_norm is not None:
        branch = normalize(branch, branch_weight, norm=branch_norm, eps=branch_eps)
    if gate is not None:
        branch = of_tokens(gate, x.shape[1], index) * branch
    return (x + branch).to(x.dtype)


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    index: Tensor | None = None,
    branch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    branch_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x1 = x + gate·u as ``gated_residual``; h = norm(x1)·(1 + scale) + shift. Returns (x1, h).

    x1 keeps x's dtype; h comes in ``out_dtype`` (default: x's).
    """
    x1 = gated_residual(
        x, branch, gate, index=index, branch_bias=branch_bias,
        branch_norm=branch_norm, branch_weight=branch_weight, branch_eps=branch_eps,
    )  # fmt: skip
    h = modulate_norm(x1, shift, scale, index=index, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype)
    return x1, h


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """p x p convolution with stride p, flattened to tokens in row-major order, plus bias and positions.

    x: (B, C, H, W); weight: (D, C, p, p); bias: (D,); pos_embed: (N, D) or (1, N, D). Returns (B, N, D).
    """
    tokens = _patches_by_product(x, weight, bias) if is_dtensor(x) else _patches_by_convolution(x, weight, bias)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    return tokens.to(out_dtype or tokens.dtype)


def _patches_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def _patches_by_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for DTensors: torch 2.11 sums a convolution's gradient over all processes, also where each has the whole of it."""
    p = weight.shape[-1]
    patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3).flatten(1, 2), weight.flatten(1), bias)


def unpatchify(tokens: Tensor, *, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, h·w, p·p·O) -> (B, O, h·p, w·p); a token's channels are ordered (row in patch, column in patch, output channel)."""
    h, w = grid
    p = patch_size
    channels = tokens.shape[-1] // (p * p)
    x = tokens.reshape(tokens.shape[0], h, w, p, p, channels)
    return torch.einsum("bhwpqo->bohpwq", x).reshape(tokens.shape[0], channels, h * p, w * p)


def patchify(image: Tensor, *, patch_size: int) -> Tensor:
    """(B, O, h·p, w·p) -> (B, h·w, p·p·O): what :func:`unpatchify` makes an image of."""
    patches = image.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return torch.einsum("bohpwq->bhwpqo", patches).flatten(3).flatten(1, 2)


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

    x, branch: (B, N, D); weight: (p·p·O, D); bias: (p·p·O,). Returns (B, O, h·p, w·p) in ``out_dtype`` (default: weight's).
    """
    if branch is not None:
        x = gated_residual(x, branch, gate, branch_bias=branch_bias)
    h = modulate_norm(x, shift, scale, weight=norm_weight, bias=norm_bias, norm=norm, eps=eps, out_dtype=weight.dtype)
    image = unpatchify(F.linear(h, weight, bias), grid=grid, patch_size=patch_size)
    return image.to(out_dtype or image.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """tanh-GELU of x + bias, in x's dtype. x: (B, N, D), what a linear without its bias has made; bias: (D,)."""
    z = x if bias is None else x + bias
    return F.gelu(z, approximate="tanh").to(x.dtype)


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor) -> Tensor:
    """fc2(tanh-GELU(fc1(x))) without the bias of fc2. x: (B, N, D); fc1_weight: (F, D); fc1_bias: (F,); fc2_weight: (E, F)."""
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias), approximate="tanh"), fc2_weight)


def split_qkv(packed: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of packed (B, N, 3, heads, head_dim), or k and v of (B, N, 2, heads, head_dim), each (B, N, heads, head_dim).

    ``bias`` (3·heads·head_dim,), or (2·heads·head_dim,), is in ``packed`` already, detached: adding nothing gives it its gradient.
    """
    nothing = (bias - bias.detach()).to(packed.dtype)
    return (packed + nothing.unflatten(0, packed.shape[2:])).unbind(2)


def attention(qkv_or_q: Tensor, kv: Tensor | None = None, *, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q·kᵀ·scale)·v with scale = head_dim^-1/2 by default.

    Packed self-attention: qkv (B, N, 3, heads, head_dim). Cross-attention: q (B, N, heads, head_dim) and
    kv (B, M, 2, heads, head_dim). ``bias`` is that of qkv, or of kv, as in ``split_qkv``. Returns (B, N, heads·head_dim).
    """
    packed = qkv_or_q if kv is None else kv
    parts = packed.unbind(2) if bias is None else split_qkv(packed, bias)
    q, k, v = parts if kv is None else (qkv_or_q, *parts)
    # torch's kernels have no rule for a batch of calls: vmap would run them one by one. That for CPUs has none for DTensors.
    if transformed() or (q.device.type == "cpu" and is_dtensor(q)):
        return attention_by_products(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale).flatten(2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2).flatten(2)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale)·v written out, half precision in fp32. q: (B, N, heads, head_dim); k, v: (B, M, heads, head_dim)."""
    dtype = q.dtype
    q, k, v = (t.transpose(1, 2).to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    weights = torch.softmax((q @ k.transpose(-1, -2)) * scale, dim=-1)
    return (weights @ v).transpose(1, 2).to(dtype)


# ---- Tensors of many processes, and transforms of torch.func ---------------------------------------------------------


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether ``torch.distributed.tensor`` spreads the tensor over processes; by name, since that module is slow to import."""
    return type(tensor).__name__ == "DTensor"


def _spread_like(parameter: Tensor, values: Tensor) -> Tensor:
    """``values`` over the processes that ``parameter`` is spread over, if it is."""
    if not is_dtensor(parameter):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether ``torch.func`` differentiates in reverse, or batches, what is being computed: ``grad``, ``vmap``, ``jacrev``."""
    return _inside(TransformType.Grad, TransformType.Vmap)


def _inside(*kinds: TransformType) -> bool:
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    # None also where Dynamo has fallen back to eager for a caller and starts again with this frame.
    return any(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack() or ())


# Dynamo takes the answers for constants, and guards on the transforms around what it compiles.
transformed._dynamo_marked_constant = _inside._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_all_samples(tensor: Tensor) -> Tensor:
    """The values below the transforms around: what ``vmap`` shows sample by sample, whole."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


# ---- The optimizer's step --------------------------------------------------------------------------------------------


@torch.no_grad()
def adamw_ema(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of every weight (Loshchilov & Hutter, arXiv 1711.05101) and of its moving average, in place.

    With g = gradient / grad_scale and t the step counted from 1,

        w ← (1 − lr·weight_decay)·w            m ← β₁·m + (1 − β₁)·g            v ← β₂·v + (1 − β₂)·g²
        w ← w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)
        average ← decay·average + (1 − decay)·w                                  copy ← w, rounded to the copy's dtype

    Where ``found_inf`` is not zero, w, m, v and t stay as they are and the average takes its step towards the unchanged w.
    """
    skipped = torch.zeros((), dtype=torch.bool, device="cpu") if found_inf is None else found_inf != 0
    for index, w in enumerate(weights):
        m, v, count = exp_avgs[index], exp_avg_sqs[index], steps[index]
        g = gradients[index].to(w.dtype)
        if grad_scale is not None:
            g = g / grad_scale
        t = (count + 1).double()
        new_m = torch.lerp(m, g, 1 - betas[0])
        new_v = betas[1] * v + (1 - betas[1]) * g * g
        step_size = (lr / (1 - betas[0] ** t)).to(w.dtype)
        denominator = new_v.sqrt() / (1 - betas[1] ** t).sqrt().to(w.dtype) + eps
        new_w = (1 - lr * weight_decay) * w - step_size * new_m / denominator
        for old, new in ((w, new_w), (m, new_m), (v, new_v), (count, count + 1)):
            old.copy_(torch.where(skipped.to(old.device), old, new))
        if averages:
            averages[index].lerp_(w, 1 - decay)
        if copies:
            copies[index].copy_(w)


# ---- Embeddings ------------------------------------------------------------------------------------------------------


def _sincos_1d(positions: Tensor, dim: int) -> Tensor:
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.reshape(-1, 1) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """2-D sine-cosine positions, (h·w, dim) fp32: the first half of the channels encodes the column, the second the row.

    Raises ValueError if dim is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"hidden_size: got {dim}; sine-cosine positions need a multiple of 4")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    return torch.cat([_sincos_1d(columns, dim // 2), _sincos_1d(rows, dim // 2)], dim=1).float()


def timestep_frequencies(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the timesteps t (B,), cosines first: (B, dim) fp32, frequencies max_period^(-i / (dim/2))."""
    half = dim // 2
    # Made of t, so that of a DTensor it is one too. The integers are counted up, since sums of floats need not be deterministic.
    exponents = (t.new_ones(half, dtype=torch.int64).cumsum(0) - 1).float() / half
    angles = t.float().unsqueeze(1) * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def computed_dtype(module: nn.Module) -> torch.dtype | None:
    """The first dtype among the weights of ``module`` that layers compute in; None where all are only stored, as int8 or fp8."""
    return next((p.dtype for p in module.parameters() if p.dtype in COMPUTED), None)


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, N, D) with positions. State: ``proj.weight`` (D, C, p, p), ``proj.bias`` (D,).

    Sizes have the public model's names and can only be read: patches and positions are made for them.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self._patch_size, self._grid = (patch_size, patch_size), grid
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in latent pixels."""
        return self._patch_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """The token grid (h, w)."""
        return self._grid

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return self._grid[0] * self._grid[1]

    def forward(self, x: Tensor, pos_embed: Tensor) -> Tensor:
        if is_dtensor(x):
            return patch_embed(x, self.proj.weight, self.proj.bias, pos_embed)
        return self.proj(x).flatten(2).transpose(1, 2) + pos_embed


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> (B, D): sinusoids, linear, SiLU, linear."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequency_embedding_size = frequency_embedding_size

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``dtype``: what the first linear takes where no weight tells."""
        frequencies = timestep_frequencies(t, self.frequency_embedding_size)
        return self.mlp(frequencies.to(computed_dtype(self.mlp) or dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) -> (B, D). In training a label becomes the null class ``num_classes`` with probability ``dropout_prob``.

    The table has a row for the null class only if ``dropout_prob`` > 0, as in the public checkpoints.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def drop(self, labels: Tensor) -> Tensor:
        dropped = torch.rand_like(labels, dtype=torch.float32) < self.dropout_prob
        return torch.where(dropped, self.num_classes, labels)

    @property
    def rows(self) -> int:
        """Labels that the table has a row for; what stands in the table's place need not say."""
        return getattr(self.embedding_table, "num_embeddings", self.num_classes + (self.dropout_prob > 0))

    def forward(self, labels: Tensor) -> Tensor:
        check_labels(labels, self.rows)
        if self.training and self.dropout_prob > 0:
            labels = self.drop(labels)
        return self.embedding_table(labels)


# ---- Blocks: the four ways of conditioning in section 3.2 of the paper -----------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention. State: ``qkv`` (3·D x D), ``proj`` (D x D), both with bias.

    Attributes:
        scale: of the products of q and k; another one may be set.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self._head_dim = hidden_size // num_heads
        self.scale = self._head_dim**-0.5
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    @property
    def head_dim(self) -> int:
        """Channels of a head; the weights have them, so that it can only be read."""
        return self._head_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)), scale=self.scale))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens (B, N, D) to a short context (B, M, D). State: ``q``, ``kv``, ``proj``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        kv = self.kv(context).unflatten(-1, (2, self.num_heads, -1))
        return self.proj(attention(q, kv))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """What the four blocks share: the classes their attentions and MLPs are made of."""

    attention_class: ClassVar[type[Attention]] = Attention
    cross_attention_class: ClassVar[type[CrossAttention]] = CrossAttention
    mlp_class: ClassVar[type[Mlp]] = Mlp
    attn: Attention
    cross_attn: CrossAttention
    mlp: Mlp


def plain_norm(hidden_size: int) -> nn.LayerNorm:
    """The norm before a modulation, which has no weights of its own."""
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift in x's dtype, as ``modulate_norm``, where ``norm`` is a module."""
    return modulate(norm(x), shift, scale).to(x.dtype)


class DiTBlock(Block):
    """The adaLN-Zero block. x: (B, N, D), c: (B, D) -> (B, N, D).

    Six vectors per sample come from c: shift, scale and gate of the attention, then of the MLP.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = plain_norm(hidden_size)
        self.attn = self.attention_class(hidden_size, num_heads)
        self.norm2 = plain_norm(hidden_size)
        self.mlp = self.mlp_class(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = gated_residual(x, self.attn(modulated(self.norm1, x, shift_msa, scale_msa)), gate_msa)
        return gated_residual(x, self.mlp(modulated(self.norm2, x, shift_mlp, scale_mlp)), gate_mlp)


class AdaLNBlock(Block):
    """The adaLN block: shifts and scales as in adaLN-Zero, but no gates. x: (B, N, D), c: (B, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = plain_norm(hidden_size)
        self.attn = self.attention_class(hidden_size, num_heads)
        self.norm2 = plain_norm(hidden_size)
        self.mlp = self.mlp_class(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = gated_residual(x, self.attn(modulated(self.norm1, x, shift_msa, scale_msa)))
        return gated_residual(x, self.mlp(modulated(self.norm2, x, shift_mlp, scale_mlp)))


class CrossAttentionBlock(Block):
    """A ViT block with a cross-attention to the context c (B, 2, D), timestep and label, after the self-attention."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = self.attention_class(hidden_size, num_heads)
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = self.cross_attention_class(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = self.mlp_class(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = gated_residual(x, self.attn(self.norm1(x)))
        x = gated_residual(x, self.cross_attn(self.norm_cross(x), c))
        return gated_residual(x, self.mlp(self.norm2(x)))


class InContextBlock(Block):
    """A plain ViT block; the conditioning, timestep and label, is two more tokens of x (B, N + 2, D). ``c`` is not read."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = self.attention_class(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = self.mlp_class(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = gated_residual(x, self.attn(self.norm1(x)))
        return gated_residual(x, self.mlp(self.norm2(x)))


class FinalLayer(nn.Module):
    """Adaptive layer norm, linear to p·p·O channels a token, unpatchify. x: (B, N, D), c: (B, D) -> (B, O, H, W)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_final = plain_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        tokens = self.linear(modulated(self.norm_final, x, shift, scale))
        return unpatchify(tokens, grid=grid, patch_size=self.patch_size)


class PlainFinalLayer(nn.Module):
    """Affine layer norm, linear, unpatchify: for the conditionings without adaLN. ``c`` is not read."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        return unpatchify(self.linear(self.norm_final(x)), grid=grid, patch_size=self.patch_size)


# ---- The model -------------------------------------------------------------------------------------------------------


class DiT(nn.Module):
    """Diffusion Transformer.

    Args:
        input_size: latent height and width, an int if square. Divisible by ``patch_size``.
        patch_size: edge of a patch in latent pixels.
        in_channels: latent channels C.
        hidden_size, depth, num_heads, mlp_ratio: transformer dimensions.
        class_dropout_prob: probability that a label is replaced by the null class in training.
        num_classes: labels are 0..num_classes-1, the null class is ``num_classes``.
        learn_sigma: predict 2·C channels, noise and variance interpolation, instead of C.
        conditioning: "adaln_zero", "adaln", "cross_attention" or "in_context".

    Raises:
        ValueError: sizes that do not divide, an unknown conditioning.
    """

    embed_class: ClassVar[type[PatchEmbed]] = PatchEmbed
    block_classes: ClassVar[dict[str, type[nn.Module]]] = {
        "adaln_zero": DiTBlock,
        "adaln": AdaLNBlock,
        "cross_attention": CrossAttentionBlock,
        "in_context": InContextBlock,
    }
    final_classes: ClassVar[dict[str, type[nn.Module]]] = {
        "adaln_zero": FinalLayer,
        "adaln": FinalLayer,
        "cross_attention": PlainFinalLayer,
        "in_context": PlainFinalLayer,
    }

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        conditioning: str = "adaln_zero",
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        _check_config(height, width, patch_size, hidden_size, num_heads, class_dropout_prob, num_classes, conditioning)
        self.input_size = (height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.conditioning = conditioning

        self.x_embedder = self.embed_class(patch_size, in_channels, hidden_size, self.grid)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = torch.empty(1, self.grid[0] * self.grid[1], hidden_size, dtype=torch.float32)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        block = self.block_classes[conditioning]
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer: Any = self.final_classes[conditioning](hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform linears with zero bias, N(0, 0.02) label table and timestep MLP, zero modulation and final linear.

        A fresh model therefore returns exactly zero. Positions and norms are filled too, so that a model that was made on the meta
        device is whole after ``to_empty`` and this.
        """
        positions = sincos_positions(self.pos_embed.shape[2], self.grid).unsqueeze(0)
        with torch.no_grad():
            self.pos_embed.copy_(_spread_like(self.pos_embed, positions))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and conditioning: (B, N, D) and (B, D) for adaLN, (B, 2, D) for cross-attention; (B, N + 2, D) in context."""
        check_inputs(self, x, t, y)
        tokens = self.x_embedder(x, self.pos_embed)
        # Where its weights are only stored, as int8 or fp8, the embedder cannot know what its linears compute in.
        told = computed_dtype(self.t_embedder) or not isinstance(self.t_embedder, TimestepEmbedder)
        t_embedding, y_embedding = self.t_embedder(*((t,) if told else (t, x.dtype))), self.y_embedder(y)
        if self.conditioning in ("adaln_zero", "adaln"):
            return tokens, t_embedding + y_embedding
        context = torch.stack([t_embedding, y_embedding.to(t_embedding.dtype)], dim=1)
        if self.conditioning == "cross_attention":
            return tokens, context
        return torch.cat([tokens, context.to(tokens.dtype)], dim=1), context

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicted noise, and variance interpolation if learn_sigma.

        Args:
            x: latents (B, C, H, W).
            t: timesteps (B,), integers of the diffusion, fp32 or fp64.
            y: labels (B,), int64 in 0..num_classes.

        Returns:
            (B, 2·C or C, H, W).
        """
        tokens, c = self.embed(x, t, y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.put_together(self.final_layer(tokens[:, : self.grid[0] * self.grid[1]], c, self.grid))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (B, h·w, p·p·O) -> (B, O, H, W). The forward calls it where a subclass or an instance has another one."""
        return unpatchify(x, grid=self.grid, patch_size=self.patch_size)

    def put_together(self, image: Tensor) -> Tensor:
        """What the final layer has put together, by ``unpatchify`` if that has been replaced."""
        if type(self).unpatchify is DiT.unpatchify and "unpatchify" not in self.__dict__:
            return image
        return self.unpatchify(patchify(image, patch_size=self.patch_size))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = 3) -> Tensor:
        """Classifier-free guidance on a batch whose second half of ``y`` is the null class.

        The first half of ``x`` is used for both halves. Guided channels become uncond + cfg_scale·(cond − uncond); the
        others keep their own prediction. By default the first 3 channels are guided, as in the published samples (a
        model with fewer guides all it has); ``guided_channels=None`` guides all in_channels. The variance channels never are.

        Args:
            x, t, y: as in ``forward``, with an even batch.
            cfg_scale: of the guided channels 1 is the conditional, 0 the unconditional prediction.

        Returns:
            (B, 2·C or C, H, W); both halves hold the same guided channels.
        """
        if x.shape[0] % 2:
            raise ValueError(f"x: got a batch of {x.shape[0]}; guidance needs an even one, labels then null classes")
        guided = self.in_channels if guided_channels is None else min(guided_channels, self.in_channels)
        if guided < 1:
            raise ValueError(f"guided_channels: got {guided_channels}, allowed are 1..{self.in_channels} or None for all")
        half = x[: x.shape[0] // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :guided], out[:, guided:]
        cond, uncond = eps.chunk(2)
        guided_eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided_eps, guided_eps]), rest], dim=1)


def _check_config(
    height: int,
    width: int,
    patch_size: int,
    hidden_size: int,
    num_heads: int,
    class_dropout_prob: float,
    num_classes: int,
    conditioning: str,
) -> None:
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning: got {conditioning!r}, allowed are {', '.join(CONDITIONINGS)}")
    if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"input_size: got {height} x {width}, which is not a positive multiple of patch_size {patch_size}")
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size: got {hidden_size}, which is no multiple of num_heads {num_heads}")
    if not 0 <= class_dropout_prob <= 1:
        raise ValueError(f"class_dropout_prob: got {class_dropout_prob}, allowed is 0..1")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}; at least 1 is needed (use 1 for unconditional data)")


def same_size(got: int, expected: int) -> bool:
    """Whether two sizes agree. Of sizes that a compiler cannot know the answer is yes, and the graph checks them when it runs."""
    if not torch.compiler.is_compiling() and not isinstance(got, torch.SymInt) and not isinstance(expected, torch.SymInt):
        return got == expected
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if not guard_or_true(got == expected):
        return False
    torch._check(got == expected)
    return True


def check_inputs(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> None:
    """Raises ValueError or TypeError, naming the argument, if (x, t, y) is no input of the model."""
    if x.ndim != 4 or x.shape[1] != model.in_channels or tuple(x.shape[2:]) != model.input_size:
        expected = f"(B, {model.in_channels}, {model.input_size[0]}, {model.input_size[1]})"
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected}")
    for name, vector in (("t", t), ("y", y)):
        if vector.ndim != 1 or not same_size(vector.shape[0], x.shape[0]):
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, expected ({x.shape[0]},) for a batch of {x.shape[0]}")
        if vector.device != x.device:
            raise ValueError(f"{name}: got device {vector.device}, but x is on {x.device}")
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y: got dtype {y.dtype}, allowed are torch.int64 and torch.int32")
    # bf16 has eight bits: 999 would be 1000, and so would 998.
    if t.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"t: got dtype {t.dtype}, which rounds timesteps; allowed are integers, torch.float32 and torch.float64")


def check_labels(labels: Tensor, rows: int) -> None:
    """Raises on labels outside 0..rows-1, as ``check_range`` does."""
    check_range("y", "label", labels, rows)


def check_range(name: str, kind: str, values: Tensor, rows: int) -> None:
    """Raises on values outside 0..rows-1; on a GPU the check runs on the device, without a synchronisation.

    Where values cannot be read there is nothing to refuse: of tensors without data, and under a compiled ``vmap``.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        values = _of_all_samples(values)
        values = values.to_local() if is_dtensor(values) else values  # type: ignore[attr-defined]
    if values.device.type == "cpu" and not compiling and not isinstance(values, FakeTensor):
        # Whoever traces must not see what is done for this answer: its shape follows from the values.
        with _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
            if values.numel():
                least, largest = values.aminmax()  # one pass over them, where to look for the first outside takes four
                if least < 0 or largest >= rows:
                    outside = values[(values < 0) | (values >= rows)]
                    raise ValueError(f"{name}: got {kind} {outside[0].item()}, allowed are 0..{rows - 1}")
    elif values.device.type != "meta" and not (compiling and _inside(TransformType.Vmap)):
        torch._assert_async(((values >= 0) & (values < rows)).all(), f"{name}: a {kind} is outside 0..{rows - 1}")


# ---- The twelve configurations of the paper --------------------------------------------------------------------------

SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)


class ModelTable(dict[str, Callable[..., Any]]):
    """Constructors by name, "DiT-XL/2" and so on; an unknown name raises a KeyError that lists the known ones."""

    def __missing__(self, name: str) -> Callable[..., Any]:
        raise KeyError(f"unknown model {name!r}, known are {', '.join(self)}")


def make_constructor(model_class: type[DiT], size: str, patch_size: int) -> Callable[..., Any]:
    """A function that builds ``model_class`` in one of the paper's configurations; keywords override or add to it."""

    def constructor(**kwargs: Any) -> DiT:
        return model_class(**{**SIZES[size], "patch_size": patch_size, **kwargs})

    constructor.__name__ = constructor.__qualname__ = f"{model_class.__name__}_{size}_{patch_size}"
    constructor.__doc__ = f"DiT-{size}/{patch_size}: {SIZES[size]}, patch_size {patch_size}."
    return constructor


def make_models(model_class: type[DiT]) -> ModelTable:
    """The twelve constructors of ``model_class`` by name."""
    return ModelTable({f"DiT-{size}/{p}": make_constructor(model_class, size, p) for size in reversed(SIZES) for p in PATCH_SIZES})


DiT_models = make_models(DiT)
