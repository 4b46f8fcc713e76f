"""Blocks of other forms: gated cross-attention (Cosmos, Kandinsky), one stream without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ditkernels.accelerate import proof
from ditkernels.accelerate.diffusers import norms
from ditkernels.accelerate.diffusers.block import CONTEXT, ByClass, Given, Keeping, Paths, rows_and_vectors
from ditkernels.accelerate.parts import Stream


class Cosmos(ByClass):
    """Attention, cross-attention and MLP, each with a norm, low-rank vectors and a gate."""

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual_norm", "gated_residual")
    norms: ClassVar[Paths] = ("norm1.norm", "norm2.norm", "norm3.norm")
    probed: ClassVar[Paths] = ("attn1", "attn2", "ff")

    def fits(self, given: Given) -> bool:
        return rows_and_vectors(given["hidden_states"], given["embedded_timestep"])

    def fused(self, given: Given) -> Any:
        x = given["hidden_states"]
        if self.before_proj is not None:
            x = self.before_proj(x) + given["latents"]
        stream = Stream(x, given["extra_pos_emb"])
        branches = (self.attended, self.crossed, self.transformed)
        for norm, path, branch in zip((self.norm1, self.norm2, self.norm3), self.norms, branches):
            shift, scale, gate = norms.low_rank(norm, given["embedded_timestep"], given["temb"]).chunk(3, dim=-1)
            x, h = self.normed(stream, path, shift, scale)
            stream = Stream(x, branch(given, h), gate)
        x = self.closed(stream)
        if given["controlnet_residual"] is not None:
            x = x + given["controlnet_residual"]
        return x if self.after_proj is None else (x, self.after_proj(x))

    def attended(self, given: Given, h: Tensor) -> Tensor:
        return self.attn1(h, image_rotary_emb=given["image_rotary_emb"])

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        options = {"encoder_hidden_states": given["encoder_hidden_states"], "attention_mask": given["attention_mask"]}
        return self.attn2(h, **options)

    def transformed(self, given: Given, h: Tensor) -> Tensor:
        return self.ff(h)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = norms.rows(part, draw, "norm1.norm")
        width = x.shape[-1]
        return {
            "hidden_states": x,
            "encoder_hidden_states": draw.normal(draw.batch, CONTEXT, width),
            "embedded_timestep": draw.normal(draw.batch, norms.takes(part, "norm1.linear_1")),
            "temb": draw.normal(draw.batch, 3 * width),
            "image_rotary_emb": draw.normal(draw.tokens, 4),
            "extra_pos_emb": draw.normal(draw.batch, draw.tokens, width),
            "attention_mask": draw.normal(draw.batch, 1, CONTEXT),
            "latents": draw.normal(draw.batch, draw.tokens, width),
        }


class Kandinsky(Keeping):
    """Kandinsky 5's block for the text: everything in fp32 but what is stored.

    Attributes:
        parts: each branch: its norm, and the layer.
        x: the name of the stream.
    """

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual_norm", "gated_residual")
    norms: ClassVar[Paths] = ("self_attention_norm", "feed_forward_norm")
    probed: ClassVar[Paths] = ("self_attention", "cross_attention", "feed_forward")
    modulation: ClassVar[str] = "text_modulation"
    x: ClassVar[str] = "x"

    def fits(self, given: Given) -> bool:
        return rows_and_vectors(given[self.x], given["time_embed"])

    def fused(self, given: Given) -> Any:
        stream = Stream(given[self.x])
        vectors = getattr(self, self.modulation)(given["time_embed"]).chunk(3 * len(self.norms), dim=-1)
        for place, (path, branch) in enumerate(zip(self.norms, self.branches())):
            shift, scale, gate = vectors[3 * place : 3 * place + 3]
            x, h = self.normed(stream, path, shift, scale)
            stream = Stream(x, branch(given, h), gate)
        return self.closed(stream)

    def branches(self) -> Sequence[Any]:
        return self.attended, self.transformed

    def attended(self, given: Given, h: Tensor) -> Tensor:
        return self.self_attention(h, rotary_emb=given["rope"])

    def transformed(self, given: Given, h: Tensor) -> Tensor:
        return self.feed_forward(h)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        time = draw.normal(draw.batch, norms.takes(part, cls.modulation))
        return {cls.x: norms.rows(part, draw, cls.norms[0]), "time_embed": time, "rope": draw.normal(draw.tokens, 4)}


class KandinskyVisual(Kandinsky):
    """Its block for the video, with a gated cross-attention between."""

    norms: ClassVar[Paths] = ("self_attention_norm", "cross_attention_norm", "feed_forward_norm")
    modulation = "visual_modulation"
    x = "visual_embed"

    def branches(self) -> Sequence[Any]:
        return self.attended, self.crossed, self.transformed

    def attended(self, given: Given, h: Tensor) -> Tensor:
        return self.self_attention(h, rotary_emb=given["rope"], sparse_params=given["sparse_params"])

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        return self.cross_attention(h, encoder_hidden_states=given["text_embed"])

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        drawn = super().drawn(part, draw)
        text = draw.normal(draw.batch, CONTEXT, drawn[cls.x].shape[-1])
        return {**drawn, "text_embed": text, "sparse_params": None}


class KandinskyLast(Keeping, norms.Modulated):
    """Its last layer, which takes (B, T, H, W, D); what stands behind the norm is a linear and the layout of the video."""

    x = "visual_embed"
    condition = "time_embed"
    chunks = 2
    maker = "modulation"

    def fits(self, given: Given) -> bool:
        x = given["visual_embed"]
        return isinstance(x, Tensor) and x.dim() == 5 and rows_and_vectors(x.flatten(1, 3), given["time_embed"])

    def activated(self, given: Given) -> Tensor:
        return given["time_embed"]

    def fused(self, given: Given) -> Any:
        x = given["visual_embed"]
        shift, scale = self.vectors(given)
        h = self.modulated(x.flatten(1, 3), shift, scale)
        patches = self.out_layer(h).unflatten(2, (-1, *self.patch_size)).unflatten(1, x.shape[1:4])
        # (B, T, H, W, C, p, q, r) as (B, T p, H q, W r, C)
        return patches.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(1, 2).flatten(2, 3).flatten(3, 4)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = norms.rows(part, draw, "norm", 2 * draw.tokens).unflatten(1, (2, draw.tokens, 1))
        return {"visual_embed": x, "text_embed": None, "time_embed": draw.normal(draw.batch, norms.takes(part, "modulation"))}


class PRX(ByClass):
    """One stream, whose attention also sees the text; an MLP whose three linears are the block's own."""

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual_norm", "gated_residual")
    norms: ClassVar[Paths] = ("img_pre_norm", "post_attention_layernorm")
    probed: ClassVar[Paths] = ("attention",)

    def fits(self, given: Given) -> bool:
        return rows_and_vectors(given["hidden_states"], given["temb"])

    def fused(self, given: Given) -> Any:
        (shift, scale, gate), (shift_mlp, scale_mlp, gate_mlp) = self.modulation(given["temb"])
        x, h = self.normed(Stream(given["hidden_states"]), "img_pre_norm", shift[:, 0], scale[:, 0])
        names = ("encoder_hidden_states", "attention_mask", "image_rotary_emb")
        branch = self.attention(hidden_states=h, **{name: given[name] for name in names})
        x, h = self.normed(Stream(x, branch, gate[:, 0]), "post_attention_layernorm", shift_mlp[:, 0], scale_mlp[:, 0])
        return self.closed(Stream(x, self.transformed(h), gate_mlp[:, 0]))

    def transformed(self, h: Tensor) -> Tensor:
        act, gate, up, down = (getattr(self, name) for name in ("mlp_act", "gate_proj", "up_proj", "down_proj"))
        return down(act(gate(h)) * up(h))

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = norms.rows(part, draw, "img_pre_norm")
        return {
            "hidden_states": x,
            "encoder_hidden_states": draw.normal(draw.batch, CONTEXT, x.shape[-1]),
            "temb": draw.normal(draw.batch, norms.takes(part, "modulation")),
            "image_rotary_emb": draw.normal(draw.tokens, 4),
            "attention_mask": draw.normal(draw.batch, 1, CONTEXT),
        }
