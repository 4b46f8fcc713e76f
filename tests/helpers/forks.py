"""A small DiT of the public structure that forks change, without timm: two blocks, sixteen tokens of 24 channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 24, 2, 2, 8, 4, 10


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)


def modulation(vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, vectors * WIDTH))


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_size = (SIDE, SIDE)
        self.proj = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].to(self.mlp[0].weight.dtype) * torch.exp(-torch.arange(4.0, device=t.device))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train:
            labels = torch.where(torch.rand(labels.shape[0], device=labels.device) < 0.1, CLASSES, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.proj_drop = nn.Dropout(0.0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj((self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.adaLN_modulation = modulation(6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = norm()
        self.linear = nn.Linear(WIDTH, PATCH * PATCH * CHANNELS)
        self.adaLN_modulation = modulation(2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, final: type[nn.Module] = FinalLayer) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = PatchEmbed(), TimestepEmbedder(), LabelEmbedder()
        self.pos_embed = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.final_layer = final()

    def unpatchify(self, tokens: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        patches = tokens.unflatten(1, (side, side)).unflatten(-1, (PATCH, PATCH, CHANNELS))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, CHANNELS, side * PATCH, side * PATCH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with parameters that all count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module.eval()
