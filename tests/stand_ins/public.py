"""The models of examples/public_models.py, and look-alikes: the same modules, other mathematics."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from tools.tree import ROOT

sys.path.append(str(ROOT / "examples"))

from public_models import Attention, DiT, DiTBlock, FinalLayer, SiT, modulate, tanh_gelu

__all__ = ["Attention", "DiT", "DiTBlock", "FinalLayer", "SiT", "modulate", "tanh_gelu"]


class SwappedBlock(DiTBlock):
    """Scale before shift."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PostNormBlock(DiTBlock):
    """The norm after the branch."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * modulate(self.norm1(self.attn(x)), shift1, scale1)
        return x + gate2.unsqueeze(1) * modulate(self.norm2(self.mlp(x)), shift2, scale2)


class OtherGeluBlock(DiTBlock):
    """Computes the MLP itself, with the exact GELU, whatever ``mlp.act`` says."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        h = nn.functional.gelu(self.mlp.fc1(modulate(self.norm2(x), shift2, scale2)))
        return x + gate2.unsqueeze(1) * self.mlp.fc2(h)


class SwappedFinalLayer(FinalLayer):
    """Scale before shift, which does not show while the linear is zero."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SkippingDiT(DiT):
    """Adds the tokens once more, halfway."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for index, block in enumerate(self.blocks):
            x = block(x, c)
            if index == 1:
                x = x + 0.1 * tokens
        return self.unpatchify(self.final_layer(x, c))


class CheckpointedDiT(DiT):
    """Recomputes its blocks in backward, without a flag that says so."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)
        return self.unpatchify(self.final_layer(x, c))


def look_alike(block_class: type[DiTBlock]) -> DiT:
    """A DiT of three blocks of which the middle one is a ``block_class``."""
    model = DiT()
    model.blocks[1] = block_class(48, 4)
    return model
