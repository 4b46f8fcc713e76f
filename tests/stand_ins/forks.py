"""Tiny models with the structure of public forks of DiT, written for these tests from their papers and their published form.

JiT (Li & He, arXiv 2511.13720), FiT (Lu et al., arXiv 2402.12376; v2 2410.13925), DDT (Wang et al., arXiv 2504.05741), DiT-MoE (Fei
et al., arXiv 2407.11633), U-ViT (Bao et al., arXiv 2209.12152), minRF (https://github.com/cloneofsimo/minRF). What matters is how
their blocks are called and what they are given; embeddings are as simple as they can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.stand_ins.lightning import SwiGLU

WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES, DEPTH = 24, 2, 2, 8, 4, 10, 4
HEAD_DIM, TOKENS, PIXELS = WIDTH // HEADS, (SIDE // PATCH) ** 2, CHANNELS * PATCH**2

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """By vectors of a sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulation(vectors: int, taken: int = WIDTH, given: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(taken, vectors * given))


def plain_norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)


class RMSNorm(nn.Module):
    """In fp32, as LLaMA's. ``eps`` is an attribute under that name, under another one, or a number in the code."""

    def __init__(self, width: int, weighted: bool = True) -> None:
        super().__init__()
        self.variance_epsilon = 1e-6
        if weighted:
            self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps())).to(x.dtype)
        return normed * self.weight if hasattr(self, "weight") else normed

    def _eps(self) -> float:
        return self.variance_epsilon


class BareNorm(RMSNorm):
    """Neither weight nor an eps that it tells."""

    def __init__(self, width: int) -> None:
        super().__init__(width, weighted=False)
        del self.variance_epsilon

    def _eps(self) -> float:
        return 1e-5


class Embedder(nn.Module):
    """Of timesteps, real or whole, in any shape."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        weight = self.mlp[0].weight
        angles = t[..., None].to(weight.dtype) * torch.exp(-torch.arange(4.0, device=t.device)).to(weight.dtype)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., head_dim) by tables of the same shape, neighbouring channels paired."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def tables(length: int) -> tuple[Tensor, Tensor]:
    angles = (torch.arange(length)[:, None] * 100.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def circle(length: int) -> Tensor:
    """Tables as complex numbers, (N, head_dim / 2)."""
    return torch.complex(*(table[:, ::2].contiguous() for table in tables(length)))


def by_circle(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs[:, None]).flatten(-2).to(x.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of (B, N, heads, head_dim)."""
    q, k, v = (t.transpose(1, 2).to(v.dtype) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Without positions, as timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attended(*self.split(x)))


class FinalLayer(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] = plain_norm) -> None:
        super().__init__()
        self.norm_final, self.linear = norm(), nn.Linear(WIDTH, PIXELS)
        self.adaLN_modulation = modulation(2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


def image_of(tokens: Tensor) -> Tensor:
    return F.fold(tokens.transpose(1, 2), (SIDE, SIDE), PATCH, stride=PATCH)


def tokens_of(image: Tensor) -> Tensor:
    return F.unfold(image, PATCH, stride=PATCH).transpose(1, 2)


# ---- JiT -------------------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Tables as plain tensors; the tokens in front of the image are not turned."""

    def __init__(self, before: int) -> None:
        super().__init__()
        cos, sin = tables(TOKENS)
        self.cos = torch.cat([torch.ones(before, HEAD_DIM), cos])
        self.sin = torch.cat([torch.zeros(before, HEAD_DIM), sin])

    def forward(self, x: Tensor) -> Tensor:
        return turned(x, self.cos[:, None], self.sin[:, None])


class JiTAttention(Attention):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.attn_drop = self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: nn.Module) -> Tensor:
        q, k, v = self.split(x)
        return self.proj_drop(self.proj(attended(rope(self.q_norm(q)), rope(self.k_norm(k)), v)))


class JiTBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.attn, self.mlp = JiTAttention(dropout), SwiGLU(WIDTH, 2 * WIDTH)
        self.adaLN_modulation = modulation(6)

    def forward(self, x: Tensor, c: Tensor, feat_rope: nn.Module | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulated(self.norm1(x), shift1, scale1), rope=feat_rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), shift2, scale2))


class JiT(nn.Module):
    """Label tokens are prepended halfway and cut off at the end; the inner blocks have dropout."""

    def __init__(self, in_context: int = 3, start: int = 1) -> None:
        super().__init__()
        self.in_context_len, self.in_context_start = in_context, start
        self.t_embedder, self.y_embedder = Embedder(), nn.Embedding(CLASSES, WIDTH)
        self.x_embedder = nn.Sequential(nn.Conv2d(CHANNELS, 6, PATCH, PATCH, bias=False), nn.Conv2d(6, WIDTH, 1))
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.in_context_posemb = nn.Parameter(torch.zeros(1, in_context, WIDTH))
        self.feat_rope, self.feat_rope_incontext = Rotary(0), Rotary(in_context)
        inner = range(DEPTH // 4, DEPTH // 4 * 3)
        self.blocks = nn.ModuleList(JiTBlock(0.2 if index in inner else 0.0) for index in range(DEPTH))
        self.final_layer = FinalLayer(lambda: RMSNorm(WIDTH))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        label = self.y_embedder(y)
        c = self.t_embedder(t) + label
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        for index, block in enumerate(self.blocks):
            if index == self.in_context_start:
                x = torch.cat([label[:, None] + self.in_context_posemb, x], dim=1)
            x = block(x, c, self.feat_rope if index < self.in_context_start else self.feat_rope_incontext)
        return image_of(self.final_layer(x[:, self.in_context_len :], c))


# ---- FiT -------------------------------------------------------------------------------------------------------------


class FiTAttention(Attention):
    def forward(self, x: Tensor, mask: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = (turned(t, freqs_cos, freqs_sin) for t in (q, k))
        same = (mask[:, None, None] == mask[:, None, :, None]).expand(-1, HEADS, -1, -1)
        return self.proj(attended(q, k, v, same) * mask[..., None].to(x.dtype))


class FiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = BareNorm(WIDTH), plain_norm()
        self.attn, self.mlp = FiTAttention(), SwiGLU(WIDTH, 2 * WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 4), nn.Linear(4, 6 * WIDTH))

    def forward(
        self, x: Tensor, c: Tensor, mask: Tensor, freqs_cos: Tensor, freqs_sin: Tensor, global_adaln: Tensor | float = 0.0
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.adaLN_modulation(c) + global_adaln).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulated(self.norm1(x), shift1, scale1), mask, freqs_cos, freqs_sin)
        return x + gate2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), shift2, scale2))


class FiT(nn.Module):
    """Tokens (B, N, C) of images of any size, with their places and a mask; low-rank vectors on top of those of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Linear(PIXELS, WIDTH), Embedder(), nn.Embedding(CLASSES, WIDTH)
        for name, table in zip(("cos", "sin"), tables(SIDE)):
            self.register_buffer(name, table, persistent=False)
        self.global_adaLN_modulation = modulation(6)
        self.blocks = nn.ModuleList(FiTBlock() for _ in range(DEPTH))
        self.final_layer = FinalLayer()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, grid: Tensor, mask: Tensor) -> Tensor:
        x = self.x_embedder(x)
        c = self.t_embedder(t) + self.y_embedder(y)
        cos, sin = (table[grid[:, 0]].unsqueeze(2) for table in (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, c, mask, cos, sin, self.global_adaLN_modulation(c))
        return self.final_layer(x, c) * mask[..., None]


# ---- DDT -------------------------------------------------------------------------------------------------------------


def of_tokens(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """By vectors of a token, or of the one segment there is."""
    return x * (1 + scale) + shift


class DDTAttention(Attention):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.width // HEAD_DIM, HEAD_DIM)).unbind(2)
        q, k = by_circle(self.q_norm(q), pos), by_circle(self.k_norm(k), pos)
        return self.proj(attended(q, k, v, mask))


class GatedMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((width, hidden), (hidden, width), (width, hidden)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DDTBlock(nn.Module):
    def __init__(self, width: int, taken: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn, self.mlp = DDTAttention(width), GatedMlp(width, 2 * width)
        self.adaLN_modulation = nn.Sequential(nn.Linear(taken, 6 * width))

    def forward(self, x: Tensor, c: Tensor, pos: Tensor, mask: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(of_tokens(self.norm1(x), shift1, scale1), pos, mask=mask)
        return x + gate2 * self.mlp(of_tokens(self.norm2(x), shift2, scale2))


class TokenFinalLayer(FinalLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear, self.adaLN_modulation = nn.Linear(width, PIXELS), nn.Sequential(nn.Linear(WIDTH, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(of_tokens(self.norm_final(x), shift, scale))


class DDT(nn.Module):
    """An encoder makes the condition of every token of a wider decoder; all blocks stand in one list. Returns both."""

    def __init__(self, encoders: int = 2, wide: int = 2 * WIDTH) -> None:
        super().__init__()
        self.encoders = encoders
        self.x_embedder, self.s_embedder = nn.Linear(PIXELS, wide), nn.Linear(PIXELS, WIDTH)
        self.t_embedder, self.y_embedder = Embedder(), nn.Embedding(CLASSES, WIDTH)
        widths = [WIDTH if index < encoders else wide for index in range(DEPTH)]
        self.blocks = nn.ModuleList(DDTBlock(width, WIDTH) for width in widths)
        self.final_layer = TokenFinalLayer(wide)
        self.positions: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        size = (x.shape[-2] // PATCH, x.shape[-1] // PATCH)
        pos = self.positions.setdefault(size, circle(size[0] * size[1]))
        x = tokens_of(x)
        t, y = self.t_embedder(t)[:, None], self.y_embedder(y)[:, None]
        c, s = F.silu(t + y), self.s_embedder(x)
        for block in self.blocks[: self.encoders]:
            s = block(s, c, pos, mask)
        s, x = F.silu(t + s), self.x_embedder(x)
        for block in self.blocks[self.encoders :]:
            x = block(x, s, pos, None)
        return image_of(self.final_layer(x, s)), s


# ---- DiT-MoE ---------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """The two best of four experts for each token, weighed, and one that all tokens share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(GatedMlp(WIDTH, WIDTH) for _ in range(4))
        self.shared_experts = GatedMlp(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        spread = torch.zeros_like(x[..., :4]).scatter(-1, chosen, weights)
        return sum(expert(x) * spread[..., [i]] for i, expert in enumerate(self.experts)) + self.shared_experts(x)


class MoEBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(), plain_norm()
        self.attn, self.moe = Attention(), Experts()
        self.adaLN_modulation = modulation(6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulated(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.moe(modulated(self.norm2(x), shift2, scale2))


class DiTMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.pos_embed = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH), nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.t_embedder, self.y_embedder = Embedder(), nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(MoEBlock() for _ in range(DEPTH))
        self.final_layer = FinalLayer()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return image_of(self.final_layer(x, c))


# ---- U-ViT -----------------------------------------------------------------------------------------------------------


class UViTBlock(nn.Module):
    """Without modulation or gates; the later blocks also see what an earlier one returned."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH) if skip else None
        self.use_checkpoint = False

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.use_checkpoint:
            return torch.utils.checkpoint.checkpoint(self._forward, x, skip, use_reentrant=False)
        return self._forward(x, skip)

    def _forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Timestep and label are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.time_embed = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH), Embedder()
        self.label_emb, self.pos_embed = nn.Embedding(CLASSES, WIDTH), nn.Parameter(torch.zeros(1, 2 + TOKENS, WIDTH))
        self.in_blocks = nn.ModuleList(UViTBlock() for _ in range(DEPTH // 2))
        self.mid_block = UViTBlock()
        self.out_blocks = nn.ModuleList(UViTBlock(skip=True) for _ in range(DEPTH // 2))
        self.norm, self.decoder_pred = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PIXELS)
        self.final_layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.label_emb(y)[:, None], self.time_embed(timesteps)[:, None], x], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.final_layer(image_of(self.decoder_pred(self.norm(x))[:, 2:]))


# ---- minRF -----------------------------------------------------------------------------------------------------------


class SplitAttention(nn.Module):
    """Norms of q and k over all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in (q, k, v))
        return self.wo(attended(by_circle(q, freqs_cis), by_circle(k, freqs_cis), v))


class TransformerBlock(nn.Module):
    """The condition, which may be narrower than the tokens, is given by keyword."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_id = index
        self.attention, self.feed_forward = SplitAttention(), GatedMlp(WIDTH, 2 * WIDTH)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(WIDTH, eps=1e-5), nn.LayerNorm(WIDTH, eps=1e-5)
        self.adaLN_modulation = modulation(6, taken=WIDTH // 2)

    def forward(self, x: Tensor, freqs_cis: Tensor, adaln_input: Tensor | None = None) -> Tensor:
        if adaln_input is None:
            x = x + self.attention(self.attention_norm(x), freqs_cis)
            return x + self.feed_forward(self.ffn_norm(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(adaln_input).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulated(self.attention_norm(x), shift1, scale1), freqs_cis)
        return x + gate2.unsqueeze(1) * self.feed_forward(modulated(self.ffn_norm(x), shift2, scale2))


class MinRF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.init_conv_seq = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2), nn.SiLU(), nn.GroupNorm(2, CHANNELS))
        self.x_embedder = nn.Linear(PIXELS, WIDTH)
        self.t_embedder, self.y_embedder = Embedder(WIDTH // 2), nn.Embedding(CLASSES, WIDTH // 2)
        self.layers = nn.ModuleList(TransformerBlock(index) for index in range(DEPTH))
        self.final_layer = FinalLayer()
        self.final_layer.adaLN_modulation = modulation(2, taken=WIDTH // 2)
        self.freqs_cis = circle(4 * TOKENS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.freqs_cis = self.freqs_cis.to(x.device)
        x = self.x_embedder(tokens_of(self.init_conv_seq(x)))
        c = self.t_embedder(t) + self.y_embedder(y)
        for layer in self.layers:
            x = layer(x, self.freqs_cis[: x.size(1)], adaln_input=c)
        return image_of(self.final_layer(x, c))


# ---- All of them -----------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """A model, and a call of it on so many samples."""

    make: Callable[[], nn.Module]
    call: Callable[[torch.Generator, int], Arguments]


def of_images(draw: torch.Generator, batch: int) -> Arguments:
    image = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=draw)
    return (image, torch.rand(batch, generator=draw), torch.randint(CLASSES, (batch,), generator=draw)), {}


def of_tokens_and_places(draw: torch.Generator, batch: int) -> Arguments:
    """The last tokens of all samples but the first are padding."""
    (_, t, y), _ = of_images(draw, batch)
    grid = torch.stack([torch.arange(TOKENS) // 4, torch.arange(TOKENS) % 4]).expand(batch, 2, TOKENS)
    mask = torch.ones(batch, TOKENS)
    mask[1:, -3:] = 0
    return (torch.randn(batch, TOKENS, PIXELS, generator=draw), t, y, grid, mask), {}


FORKS = {
    "JiT": Published(JiT, of_images),
    "FiT": Published(FiT, of_tokens_and_places),
    "DDT": Published(DDT, of_images),
    "DiT-MoE": Published(DiTMoE, of_images),
    "U-ViT": Published(UViT, of_images),
    "minRF": Published(MinRF, of_images),
}
