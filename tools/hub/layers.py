"""Layers for the place of diffusers' norms with a modulation: ``kernels.kernelize`` takes their ``forward`` and nothing else.

Each reads the weights of the layer whose place it takes (diffusers 0.42, models/normalization.py), gives its outputs to rounding,
and has a backward. A layer norm with weights of its own, or another kind of norm, runs as it is written there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops import modulate_norm


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift. x: (B, N, D); shift, scale: (B, D)."""
    plain = type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 and norm.weight is None
    if not plain or x.ndim != 3:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    return modulate_norm(x, shift, scale, eps=norm.eps, out_dtype=torch.promote_types(x.dtype, scale.dtype))


class AdaLayerNormContinuous(nn.Module):
    """The norm of the last layer; linear(silu(c)) is (scale, shift). x: (B, N, D), conditioning_embedding: (B, C) -> (B, N, D)."""

    can_torch_compile: bool = True
    has_backward: bool = True
    silu: nn.Module
    linear: nn.Module
    norm: nn.Module

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return _modulated(self.norm, x, shift, scale)


class AdaLayerNormZeroSingle(nn.Module):
    """The norm of a parallel block; linear(silu(emb)) is (shift, scale, gate). x: (B, N, D), emb: (B, C) -> (B, N, D), (B, D)."""

    can_torch_compile: bool = True
    has_backward: bool = True
    silu: nn.Module
    linear: nn.Module
    norm: nn.Module

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert emb is not None
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return _modulated(self.norm, x, shift, scale), gate
