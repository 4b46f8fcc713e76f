"""Blocks of one stream that looks at its text by cross-attention, with vectors of a table plus the condition of all blocks.

PixArt's adaLN-single (Chen et al., arXiv 2310.00426) and what came of it: attention, ungated cross-attention, MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ditkernels.accelerate import proof
from ditkernels.accelerate.diffusers import norms
from ditkernels.accelerate.diffusers.block import CONTEXT, ByClass, Given, Keeping, Paths, rows_and_vectors
from ditkernels.accelerate.parts import Stream


class Crossed(ByClass):
    """The block of one stream.

    Attributes:
        norms: that of the attention, that of the MLP, and, where there is one, that of the cross-attention.
        x, condition: the names of the arguments.
    """

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual", "gated_residual_norm")
    norms: ClassVar[Paths] = ("norm1", "norm2")
    probed: ClassVar[Paths] = ("attn1", "attn2", "ff")
    x: ClassVar[str] = "hidden_states"
    condition: ClassVar[str] = "temb"

    def fits(self, given: Given) -> bool:
        x, temb = given[self.x], given[self.condition]
        return isinstance(temb, Tensor) and self.of_samples(temb) and rows_and_vectors(x, temb.flatten(1))

    def of_samples(self, temb: Tensor) -> bool:
        """Whether a condition is one of samples: six vectors of each."""
        return temb.dim() <= 3 and temb[0].numel() == self.table().numel()

    def table(self) -> Tensor:
        table: Tensor = self.scale_shift_table
        return table.squeeze(0) if table.dim() == 3 else table

    def vectors(self, temb: Tensor) -> Sequence[Tensor]:
        """Shift, scale and gate of the attention and of the MLP, each (B, D)."""
        return (self.table()[None] + temb.reshape(temb.shape[0], *self.table().shape)).unbind(1)

    def fused(self, given: Given) -> Any:
        first, last, *between = self.norms
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.vectors(given[self.condition])
        x, h = self.normed(Stream(given[self.x]), first, shift, scale)
        stream = Stream(x, self.attended(given, h), gate)
        if self.crosses(given):
            x, h = self.seen(stream, *between)
            stream = Stream(x, self.crossed(given, h))
        x, h = self.normed(stream, last, shift_mlp, scale_mlp)
        return self.closed(Stream(x, self.transformed(given, h), gate_mlp))

    def seen(self, stream: Stream, *norm: str) -> tuple[Tensor, Tensor]:
        """The stream, and what of it the cross-attention is given."""
        if norm and self.has(norm[0]):
            return self.normed(stream, norm[0])
        x = self.closed(stream)
        return x, x

    def crosses(self, given: Given) -> bool:
        return self.attn2 is not None

    def attended(self, given: Given, h: Tensor) -> Tensor:
        """The attention's branch."""
        raise NotImplementedError

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        """The cross-attention's branch."""
        raise NotImplementedError

    def transformed(self, given: Given, h: Tensor) -> Tensor:
        """The MLP's branch."""
        return self.ff(h)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = norms.rows(part, draw, cls.norms[0])
        text = draw.normal(draw.batch, CONTEXT, x.shape[-1])
        return {cls.x: x, "encoder_hidden_states": text, cls.condition: cls.drawn_condition(draw, x.shape[-1]), **cls.rest(draw)}

    @classmethod
    def drawn_condition(cls, draw: proof.Draw, width: int) -> Tensor:
        return draw.normal(draw.batch, 6 * width)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        """What the attentions are given besides."""
        return {}


def mask(draw: proof.Draw) -> Tensor:
    return draw.normal(draw.batch, 1, CONTEXT)


class PixArt(Crossed):
    """The library's basic block, as it is with norm_type "ada_norm_single"."""

    condition = "timestep"

    def fits(self, given: Given) -> bool:
        return given["cross_attention_kwargs"] is None and super().fits(given)

    def attended(self, given: Given, h: Tensor) -> Tensor:
        context = given["encoder_hidden_states"] if self.only_cross_attention else None
        return self.attn1(h, encoder_hidden_states=context, attention_mask=given["attention_mask"])

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        options = {"encoder_hidden_states": given["encoder_hidden_states"], "attention_mask": given["encoder_attention_mask"]}
        return self.attn2(h, **options)

    @classmethod
    def applies(cls, part: Any) -> bool:
        return getattr(part, "norm_type", None) == "ada_norm_single" and not getattr(part, "positional_embeddings", None)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return {"attention_mask": mask(draw), "encoder_attention_mask": mask(draw)}


class Allegro(Crossed):
    def attended(self, given: Given, h: Tensor) -> Tensor:
        options = {"attention_mask": given["attention_mask"], "image_rotary_emb": given["image_rotary_emb"]}
        return self.attn1(h, encoder_hidden_states=None, **options)

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        options = {"encoder_hidden_states": given["encoder_hidden_states"], "attention_mask": given["encoder_attention_mask"]}
        return self.attn2(h, **options, image_rotary_emb=None)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        rotary = draw.normal(draw.tokens, 4)
        return {"attention_mask": mask(draw), "encoder_attention_mask": mask(draw), "image_rotary_emb": rotary}


class Sana(Crossed):
    """The MLP is one of convolutions over the image, of which the block is told height and width."""

    condition = "timestep"
    sides: ClassVar[tuple[str, ...]] = ("height", "width")

    def attended(self, given: Given, h: Tensor) -> Tensor:
        return self.attn1(h.to(given["hidden_states"].dtype))

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        options = {"encoder_hidden_states": given["encoder_hidden_states"], "attention_mask": given["encoder_attention_mask"]}
        return self.attn2(h, **options)

    def transformed(self, given: Given, h: Tensor) -> Tensor:
        image = h.unflatten(1, (given["height"], given["width"])).permute(0, 3, 1, 2)
        return self.ff(image).flatten(2, 3).permute(0, 2, 1)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        ones = dict.fromkeys(cls.sides, 1)
        return {**ones, cls.sides[-1]: draw.tokens, "encoder_attention_mask": mask(draw)}


class SanaVideo(Sana):
    """The condition is one of frames; where all have the same, (B, 1, 6 D)."""

    sides = ("frames", "height", "width")

    def attended(self, given: Given, h: Tensor) -> Tensor:
        return self.attn1(h.to(given["hidden_states"].dtype), rotary_emb=given["rotary_emb"])

    def transformed(self, given: Given, h: Tensor) -> Tensor:
        return self.ff(h.unflatten(1, tuple(given[side] for side in self.sides))).flatten(1, 3)

    @classmethod
    def drawn_condition(cls, draw: proof.Draw, width: int) -> Tensor:
        return draw.normal(draw.batch, 1, 6 * width)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return {**super().rest(draw), "rotary_emb": draw.normal(1, draw.tokens, 4)}


class LTX(Crossed):
    """The condition is one of tokens; where all have the same, (B, 1, 6 D)."""

    def attended(self, given: Given, h: Tensor) -> Tensor:
        return self.attn1(hidden_states=h, encoder_hidden_states=None, image_rotary_emb=given["image_rotary_emb"])

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        options = {"encoder_hidden_states": given["encoder_hidden_states"], "attention_mask": given["encoder_attention_mask"]}
        return self.attn2(h, **options, image_rotary_emb=None)

    @classmethod
    def drawn_condition(cls, draw: proof.Draw, width: int) -> Tensor:
        return draw.normal(draw.batch, 1, 6 * width)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return {"image_rotary_emb": draw.normal(draw.batch, draw.tokens, 4), "encoder_attention_mask": mask(draw)}


class Wan(Keeping, Crossed):
    """Vectors in fp32; the norm of the cross-attention has weights."""

    norms: ClassVar[Paths] = ("norm1", "norm3", "norm2")
    probed: ClassVar[Paths] = ("attn1", "attn2", "ffn")

    def vectors(self, temb: Tensor) -> Sequence[Tensor]:
        return super().vectors(temb.float())

    def crosses(self, given: Given) -> bool:
        return True

    def attended(self, given: Given, h: Tensor) -> Tensor:
        return self.attn1(h, None, self.attention_mask(given), given["rotary_emb"])

    def attention_mask(self, given: Given) -> Tensor | None:
        return None

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        return self.attn2(h, given["encoder_hidden_states"], None, None)

    def transformed(self, given: Given, h: Tensor) -> Tensor:
        return self.ffn(h)

    @classmethod
    def drawn_condition(cls, draw: proof.Draw, width: int) -> Tensor:
        return draw.normal(draw.batch, 6, width)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return {"rotary_emb": draw.normal(1, draw.tokens, 1, 4)}


class SkyReels(Wan):
    def attention_mask(self, given: Given) -> Tensor | None:
        return given["attention_mask"]

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return {**super().rest(draw), "attention_mask": mask(draw)}


class WanVACE(Wan):
    """The stream is the control's; what it tells the blocks beside it is made of it by a linear."""

    x = "control_hidden_states"

    def fits(self, given: Given) -> bool:
        return isinstance(given["hidden_states"], Tensor) and super().fits(given)

    def fused(self, given: Given) -> Any:
        control = given["control_hidden_states"]
        if self.proj_in is not None:
            control = self.proj_in(control) + given["hidden_states"]
        control = super().fused({**given, "control_hidden_states": control})
        return (None if self.proj_out is None else self.proj_out(control)), control

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return super().rest(draw)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        return {**super().drawn(part, draw), "hidden_states": norms.rows(part, draw, "norm1")}


class AceStep(Keeping, Crossed):
    """The cross-attention has a norm, and is passed over where there is no text."""

    norms: ClassVar[Paths] = ("self_attn_norm", "mlp_norm", "cross_attn_norm")
    probed: ClassVar[Paths] = ("self_attn", "cross_attn", "mlp")

    def crosses(self, given: Given) -> bool:
        return self.use_cross_attention and given["encoder_hidden_states"] is not None

    def attended(self, given: Given, h: Tensor) -> Tensor:
        options = {"image_rotary_emb": given["position_embeddings"], "attention_mask": given["attention_mask"]}
        return self.self_attn(hidden_states=h, **options)

    def crossed(self, given: Given, h: Tensor) -> Tensor:
        options = {"encoder_hidden_states": given["encoder_hidden_states"], "attention_mask": given["encoder_attention_mask"]}
        return self.cross_attn(hidden_states=h, **options)

    def transformed(self, given: Given, h: Tensor) -> Tensor:
        return self.mlp(h)

    @classmethod
    def drawn_condition(cls, draw: proof.Draw, width: int) -> Tensor:
        return draw.normal(draw.batch, 6, width)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        masks = {"attention_mask": mask(draw), "encoder_attention_mask": mask(draw)}
        return {**masks, "position_embeddings": draw.normal(draw.tokens, 4)}
