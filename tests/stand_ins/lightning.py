"""A model with the structure of LightningDiT (arXiv 2501.01423): RMS norm with a weight, SwiGLU, rotary positions, QK-norm, a
modulation without shifts, each of them optional. Written for these tests from the paper and from the names in its checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Mlp
from torch import Tensor, nn

from tests.stand_ins.public import DiT, FinalLayer, modulate, tanh_gelu


class RMSNorm(nn.Module):
    """In fp32 whatever comes in, as LLaMA's."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class RotaryEmbedding(nn.Module):
    """2-D rotary positions for (B, heads, N, head_dim), neighbouring channels paired, rows then columns."""

    def __init__(self, head_dim: int, side: int) -> None:
        super().__init__()
        rates = 10000.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
        angles = (torch.arange(side)[:, None] * rates).repeat_interleave(2, dim=-1)
        rows = angles[:, None].expand(side, side, -1)
        both = torch.cat([rows, rows.transpose(0, 1)], dim=-1).reshape(side * side, head_dim)
        self.register_buffer("freqs_cos", both.cos())
        self.register_buffer("freqs_sin", both.sin())

    def forward(self, t: Tensor) -> Tensor:
        even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return t * self.freqs_cos + turned * self.freqs_sin


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool, rms: bool) -> None:
        super().__init__()
        self.num_heads, head_dim = heads, width // heads
        norm = RMSNorm if rms else nn.LayerNorm
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = norm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm(head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, rope: nn.Module | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q).to(v.dtype), rope(k).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class LightningBlock(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        ratio: float = 4.0,
        qk_norm: bool = False,
        swiglu: bool = True,
        rms: bool = True,
        wo_shift: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            RMSNorm(width) if rms else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.attn = Attention(width, heads, qk_norm, rms)
        hidden = int(width * ratio)
        self.mlp = SwiGLU(width, hidden * 2 // 3) if swiglu else Mlp(width, hidden, act_layer=tanh_gelu)
        self.wo_shift = wo_shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (4 if wo_shift else 6) * width))

    def forward(self, x: Tensor, c: Tensor, feat_rope: nn.Module | None = None) -> Tensor:
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = self.adaLN_modulation(c).chunk(4, dim=1)
            shift1 = shift2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope=feat_rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class LightningDiT(DiT):
    """The second half of the channels is dropped if ``learn_sigma``; ``use_checkpoint`` recomputes the blocks in backward."""

    block = LightningBlock

    def __init__(self, *, rope: bool = True, use_checkpoint: bool = False, **config: object) -> None:
        rms = config.get("rms", True)
        super().__init__(**config)
        width, heads = self.pos_embed.shape[-1], self.blocks[0].attn.num_heads
        self.use_checkpoint = use_checkpoint
        self.feat_rope = RotaryEmbedding(width // heads, self.x_embedder.grid_size[0]) if rope else None
        if rms:
            self.final_layer = FinalLayer(width, self.patch_size, self.out_channels)
            self.final_layer.norm_final = RMSNorm(width)

    def forward(self, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            if self.use_checkpoint:
                x = torch.utils.checkpoint.checkpoint(block, x, c, self.feat_rope, use_reentrant=False)
            else:
                x = block(x, c, self.feat_rope)
        image = self.unpatchify(self.final_layer(x, c))
        return image.chunk(2, dim=1)[0] if self.learn_sigma else image
