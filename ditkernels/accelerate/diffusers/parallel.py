"""The blocks of one stream that models of two streams have before and behind: refiners of the text, and parallel blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkernels.accelerate import proof
from ditkernels.accelerate.diffusers import norms
from ditkernels.accelerate.diffusers.block import CONTEXT, Given, Paths, in_range, rows_and_vectors
from ditkernels.accelerate.diffusers.joint import Attending, Chroma, HunyuanImage, flat_vectors, gate_of, pairs
from ditkernels.accelerate.parts import Stream

# ---- One after the other ---------------------------------------------------------------------------------------------


class RefiningAuraFlow(Attending):
    """AuraFlow's block of one stream."""

    fuses: ClassVar[Paths] = ("gated_residual_norm", "gated_residual")
    norms: ClassVar[Paths] = ("norm2",)
    passed: ClassVar[Mapping[str, str]] = {}
    spread: ClassVar[str | None] = "attention_kwargs"

    def fits(self, given: Given) -> bool:
        return rows_and_vectors(given["hidden_states"], given["temb"])

    def fused(self, given: Given) -> Any:
        x = given["hidden_states"]
        h, gate, shift, scale, gate_mlp = self.norm1(x, emb=given["temb"])
        closed, h = self.normed(Stream(x, self.attended(given, h), gate), "norm2", shift, scale)
        return self.behind(x, closed, self.ff(h), gate_mlp)

    def behind(self, x: Tensor, closed: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        """The MLP's branch is added to what the block was given."""
        return self.closed(Stream(x, branch, gate))

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        temb = draw.normal(draw.batch, norms.takes(part, "norm1"))
        return {"hidden_states": norms.rows(part, draw, "norm2"), "temb": temb}


class RefiningSD3(RefiningAuraFlow):
    spread: ClassVar[str | None] = None

    def attended(self, given: Given, h: Tensor, hc: Tensor | None = None) -> Any:
        return self.attn(hidden_states=h, encoder_hidden_states=None)

    def behind(self, x: Tensor, closed: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return self.closed(Stream(closed, branch, gate))


class Refining(Attending):
    """Hunyuan's blocks for the text: gates without modulation, and norms with weights."""

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual_norm", "gated_residual")
    norms: ClassVar[Paths] = ("norm1", "norm2")
    passed: ClassVar[Mapping[str, str]] = {"attention_mask": "attention_mask"}

    def fits(self, given: Given) -> bool:
        return rows_and_vectors(given["hidden_states"], given["temb"])

    def fused(self, given: Given) -> Any:
        x, h = self.normed(Stream(given["hidden_states"]), "norm1")
        branch = self.attended(given, h)
        gate, gate_mlp = (gate_of(vector) for vector in self.norm_out(given["temb"]))
        x, h = self.normed(Stream(x, branch, gate), "norm2")
        return self.closed(Stream(x, self.ff(h), gate_mlp))

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        temb = draw.normal(draw.batch, norms.takes(part, "norm_out"))
        return {"hidden_states": norms.rows(part, draw, "norm1"), "temb": temb, **cls.rest(draw)}


# ---- Side by side ----------------------------------------------------------------------------------------------------


class Parallel(Attending):
    """Attention and MLP side by side on one normed stream, then one linear for both.

    Attributes:
        length: "text" where the block joins text and image in that order, "image" in the other; "" where they come joined.
    """

    fuses: ClassVar[Paths] = ("gated_residual",)
    probed: ClassVar[Paths] = ("attn", "cross_attn")
    spread: ClassVar[str | None] = "joint_attention_kwargs"
    condition = ("temb", "norm")
    first: ClassVar[str] = "text"

    def fits(self, given: Given) -> bool:
        streams = [given["hidden_states"]] + ([given["encoder_hidden_states"]] if self.first else [])
        return all(rows_and_vectors(x, self.vector(given)) for x in streams)

    def vector(self, given: Given) -> Any:
        """One vector of the condition."""
        return given["temb"]

    def fused(self, given: Given) -> Any:
        x, text = self.joined(given)
        h, gate = self.norm(x, emb=given["temb"])
        branch = self.branch(given, h, text)
        return self.parted(in_range_if(self.spread is not None, self.closed(Stream(x, branch, gate))), text)

    def joined(self, given: Given) -> tuple[Tensor, int]:
        """The one stream, and how many tokens of it are text."""
        x = given["hidden_states"]
        if not self.first:
            return x, 0
        context = given["encoder_hidden_states"]
        return torch.cat([context, x] if self.first == "text" else [x, context], dim=1), context.shape[1]

    def branch(self, given: Given, h: Tensor, text: int) -> Tensor:
        """What is added to the stream, but for its gate."""
        mlp = self.transformed(h)
        return self.proj_out(torch.cat([self.attended(given, h), mlp], dim=2))

    def transformed(self, h: Tensor) -> Tensor:
        return self.act_mlp(self.proj_mlp(h))

    def parted(self, x: Tensor, text: int) -> Any:
        """As the block returns it."""
        if not self.first:
            return x
        return (x[:, :text], x[:, text:]) if self.first == "text" else (x[:, :-text], x[:, -text:])

    @classmethod
    def streams(cls, part: Any, draw: proof.Draw) -> tuple[Tensor, Tensor]:
        width = norms.width_at(part, "norm.norm")
        return draw.rows(draw.batch, draw.tokens, width), draw.rows(draw.batch, CONTEXT, width)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        drawn = super().drawn(part, draw)
        return drawn if cls.first else {name: value for name, value in drawn.items() if name != "encoder_hidden_states"}


def in_range_if(clipped: bool, x: Tensor) -> Tensor:
    return in_range(x) if clipped else x


class ParallelBria(Parallel):
    spread: ClassVar[str | None] = "attention_kwargs"


class ParallelFibo(Parallel):
    first = ""


class ParallelOvis(Parallel):
    """A gated MLP."""

    def transformed(self, h: Tensor) -> Tensor:
        value, gate = self.proj_mlp(h).chunk(2, dim=-1)
        return self.act_mlp(gate) * value


class ParallelChroma(ParallelFibo):
    passed: ClassVar[Mapping[str, str]] = Chroma.passed

    def vector(self, given: Given) -> Any:
        return given["temb"][:, 0]

    def keywords(self, given: Given) -> dict[str, Any]:
        return super().keywords({**given, "attention_mask": pairs(given["attention_mask"])})

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        image, _ = cls.streams(part, draw)
        return {"hidden_states": image, "temb": draw.normal(draw.batch, 3, image.shape[-1]), **cls.rest(draw)}


class ParallelHunyuan(Parallel):
    """The attention takes both streams, image before text."""

    passed: ClassVar[Mapping[str, str]] = HunyuanImage.passed
    spread: ClassVar[str | None] = None
    first = "image"

    def branch(self, given: Given, h: Tensor, text: int) -> Tensor:
        mlp = self.transformed(h)
        image, context = self.attended(given, h[:, :-text], h[:, -text:])
        image = self.crossed(given, image, h[:, -text:])
        return self.proj_out(torch.cat([torch.cat([image, context], dim=1), mlp], dim=2))

    def crossed(self, given: Given, image: Tensor, hc: Tensor) -> Tensor:
        """The image's branch, once more in sight of the text in some models."""
        return image


class ParallelMotif(ParallelHunyuan):
    def crossed(self, given: Given, image: Tensor, hc: Tensor) -> Tensor:
        if self.cross_attn is None:
            return image
        options = {**self.keywords(given), "image_embed_seq_len": given["image_embed_seq_len"]}
        return image + self.cross_attn(hidden_states=image, encoder_hidden_states=hc, **options)


class ParallelFlux2(Parallel):
    """A plain norm, three vectors of all blocks, and an attention that holds the MLP."""

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual")
    norms: ClassVar[Paths] = ("norm",)

    def fits(self, given: Given) -> bool:
        vectors, context = flat_vectors(given["temb_mod"]), given["encoder_hidden_states"]
        streams = (given["hidden_states"], *([] if context is None else [context]))
        return all(rows_and_vectors(x, vectors) for x in streams)

    def fused(self, given: Given) -> Any:
        x, text = self._joined_if_apart(given)
        shift, scale, gate = flat_vectors(given["temb_mod"]).chunk(3, dim=-1)
        _, h = self.normed(Stream(x), "norm", shift, scale)
        x = in_range(self.closed(Stream(x, self.attended(given, h), gate)))
        return self.parted(x, text) if given["split_hidden_states"] else x

    def _joined_if_apart(self, given: Given) -> tuple[Tensor, Any]:
        return (given["hidden_states"], given["text_seq_len"]) if given["encoder_hidden_states"] is None else self.joined(given)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = norms.rows(part, draw, "norm")
        return {
            "hidden_states": x,
            "encoder_hidden_states": None,
            "temb_mod": draw.normal(draw.batch, 3 * x.shape[-1]),
            **cls.rest(draw),
        }
