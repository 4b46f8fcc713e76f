"""Blocks of two streams with joint attention, image and text.

MMDiT (Esser et al., arXiv 2403.03206) and what came of it: each stream has a norm, its part of one attention, a gated residual, a
second norm, an MLP and a gated residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditkernels.accelerate import proof
from ditkernels.accelerate.diffusers import norms
from ditkernels.accelerate.diffusers.block import CONTEXT, ByClass, Given, Paths, in_range, rows_and_vectors
from ditkernels.accelerate.parts import Stream

Opened = Sequence[Any]
"""What a stream has once it is normed: h, the gate of the attention, and shift, scale and gate of the MLP. One that ends in the
attention has h alone."""


class Attending(ByClass):
    """A block that calls an attention on streams of image and text.

    Attributes:
        attention: its path.
        passed: arguments of the block that the attention is given, by the names it has for them.
        spread: the argument whose items the attention is given.
        condition: the name of the condition (B, C), and the path of the module whose first linear takes it.
        text_first: whether the text is returned, or stands, before the image.
        clipped: which streams are kept in fp16's range, of "image" and "text".
    """

    probed: ClassVar[Paths] = ("attn", "attn1", "attn2", "cross_attn", "ff", "ff_context")
    joint: ClassVar[Paths] = ("attn", "attn1")
    attention: ClassVar[str] = "attn"
    passed: ClassVar[Mapping[str, str]] = {"image_rotary_emb": "image_rotary_emb"}
    spread: ClassVar[str | None] = None
    condition: ClassVar[tuple[str, str]] = ("temb", "norm1")
    text_first: ClassVar[bool] = True

    def fits(self, given: Given) -> bool:
        streams = (given["hidden_states"], given["encoder_hidden_states"])
        return all(rows_and_vectors(x, given[self.condition[0]]) for x in streams)

    def attended(self, given: Given, h: Tensor, hc: Tensor | None = None) -> Any:
        """The attention's branches."""
        context = {} if hc is None else {"encoder_hidden_states": hc}
        attention: Any = getattr(self, self.attention)
        return attention(hidden_states=h, **context, **self.keywords(given))

    def keywords(self, given: Given) -> dict[str, Any]:
        spread = given[self.spread] if self.spread else None
        return {name: given[argument] for name, argument in self.passed.items()} | (spread or {})

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        name, linear = cls.condition
        image, text = cls.streams(part, draw)
        drawn = {"hidden_states": image, "encoder_hidden_states": text, name: draw.normal(draw.batch, norms.takes(part, linear))}
        return drawn | cls.rest(draw)

    @classmethod
    def streams(cls, part: Any, draw: proof.Draw) -> tuple[Tensor, Tensor]:
        return norms.rows(part, draw, cls.norms[0]), norms.rows(part, draw, cls.norms[0], CONTEXT)

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        """What is passed on to the attention."""
        return {argument: draw.normal(draw.batch, 3) for argument in cls.passed.values()}


# ---- Two streams -----------------------------------------------------------------------------------------------------


class Joint(Attending):
    """The block of two streams.

    Attributes:
        norms: the second norms of image and text, which stand before the MLPs; the first are modules that return h and vectors.
        mlps: the MLPs of image and text.
    """

    fuses: ClassVar[Paths] = ("gated_residual_norm", "gated_residual")
    norms: ClassVar[Paths] = ("norm2", "norm2_context")
    mlps: ClassVar[Paths] = ("ff", "ff_context")
    clipped: ClassVar[tuple[str, ...]] = ()

    def fused(self, given: Given) -> Any:
        x, context = given["hidden_states"], given["encoder_hidden_states"]
        image, text = self.opened(given)
        branches = self.attended(given, image[0], text[0])
        streams = self.between(given, x, image, text, branches), Stream(context, branches[1], text[1])
        x, h = self.normed(streams[0], self.norms[-2], *image[2:4])
        context, hc = self.normed(streams[1], self.norms[-1], *text[2:4])
        f, fc = self.transformed(h, hc)
        x, context = self.closed(Stream(x, f, image[4])), self.closed(Stream(context, fc, text[4]))
        return self.returned(x, context, branches[2:])

    def opened(self, given: Given) -> tuple[Opened, Opened]:
        """Both streams normed, each by the module of its own."""
        condition = given[self.condition[0]]
        return self.norm1(given["hidden_states"], emb=condition), self.norm1_context(given["encoder_hidden_states"], emb=condition)

    def between(self, given: Given, x: Tensor, image: Opened, text: Opened, branches: Sequence[Tensor]) -> Stream:
        """The image behind its attention."""
        return Stream(x, branches[0], image[1])

    def transformed(self, h: Tensor, hc: Tensor) -> tuple[Tensor, Tensor]:
        """The branches of the MLPs."""
        first, second = (getattr(self, name) for name in self.mlps)
        return first(h), second(hc)

    def returned(self, x: Tensor, context: Tensor, further: Sequence[Tensor]) -> Any:
        """Both streams in order; IP adapters have the attention return a third branch, which is added as it is."""
        for branch in further:
            x = self.closed(Stream(x, branch))
        x = in_range(x) if "image" in self.clipped else x
        context = in_range(context) if "text" in self.clipped else context
        return (context, x) if self.text_first else (x, context)


class Flux(Joint):
    spread: ClassVar[str | None] = "joint_attention_kwargs"
    clipped = ("text",)


class Bria(Flux):
    spread: ClassVar[str | None] = "attention_kwargs"


class Chroma(Flux):
    """The vectors of all blocks are made outside: (B, 12, D), of the image and of the text. A mask becomes one of pairs."""

    passed: ClassVar[Mapping[str, str]] = {"image_rotary_emb": "image_rotary_emb", "attention_mask": "attention_mask"}

    def fits(self, given: Given) -> bool:
        temb = given["temb"]
        return isinstance(temb, Tensor) and temb.dim() == 3 and super().fits({**given, "temb": temb[:, 0]})

    def opened(self, given: Given) -> tuple[Opened, Opened]:
        image, text = given["temb"][:, :6], given["temb"][:, 6:]
        return self.norm1(given["hidden_states"], emb=image), self.norm1_context(given["encoder_hidden_states"], emb=text)

    def keywords(self, given: Given) -> dict[str, Any]:
        return super().keywords({**given, "attention_mask": pairs(given["attention_mask"])})

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        image, text = cls.streams(part, draw)
        temb = draw.normal(draw.batch, 12, image.shape[-1])
        return {"hidden_states": image, "encoder_hidden_states": text, "temb": temb, **cls.rest(draw)}


def pairs(mask: Tensor | None) -> Tensor | None:
    """A mask of tokens (B, N) as one of pairs of tokens (B, 1, N, N)."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


class SD3(Joint):
    """In 3.5 a second attention stands between, and the last block's text ends in the attention."""

    passed: ClassVar[Mapping[str, str]] = {}
    spread: ClassVar[str | None] = "joint_attention_kwargs"

    def opened(self, given: Given) -> tuple[Opened, Opened]:
        if not self.context_pre_only:
            return super().opened(given)
        temb = given["temb"]
        return self.norm1(given["hidden_states"], emb=temb), (self.norm1_context(given["encoder_hidden_states"], temb),)

    def fused(self, given: Given) -> Any:
        if self.use_dual_attention or self.context_pre_only:
            return self._in_turn(given)
        return super().fused(given)

    def _in_turn(self, given: Given) -> Any:
        x, context = given["hidden_states"], given["encoder_hidden_states"]
        image, text = self.opened(given)
        branches = self.attended(given, image[0], text[0])
        x = self._finished(self.between(given, x, image, text, branches), "norm2", "ff", *image[2:5])
        if self.context_pre_only:
            return None, x
        return self._finished(Stream(context, branches[1], text[1]), "norm2_context", "ff_context", *text[2:5]), x

    def between(self, given: Given, x: Tensor, image: Opened, text: Opened, branches: Sequence[Tensor]) -> Stream:
        stream = Stream(x, branches[0], image[1])
        if not self.use_dual_attention:
            return stream
        h2, gate2 = image[5:]
        return Stream(self.closed(stream), self.attn2(hidden_states=h2, **self.keywords(given)), gate2)

    def _finished(self, stream: Stream, norm: str, mlp: str, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        x, h = self.normed(stream, norm, shift, scale)
        return self.closed(Stream(x, getattr(self, mlp)(h), gate))


class AuraFlow(Joint):
    """The MLP's branch is added to what the block was given, and not to what the attention made of it."""

    passed: ClassVar[Mapping[str, str]] = {}
    spread: ClassVar[str | None] = "attention_kwargs"

    def fused(self, given: Given) -> Any:
        x, context = given["hidden_states"], given["encoder_hidden_states"]
        image, text = self.opened(given)
        branch, c_branch = self.attended(given, image[0], text[0])
        _, h = self.normed(Stream(x, branch, image[1]), "norm2", *image[2:4])
        _, hc = self.normed(Stream(context, c_branch, text[1]), "norm2_context", *text[2:4])
        f, fc = self.transformed(h, hc)
        return self.closed(Stream(context, fc, text[4])), self.closed(Stream(x, f, image[4]))


class HunyuanVideo(Joint):
    passed: ClassVar[Mapping[str, str]] = {"image_rotary_emb": "freqs_cis", "attention_mask": "attention_mask"}
    text_first = False


class HunyuanImage(HunyuanVideo):
    passed: ClassVar[Mapping[str, str]] = {"image_rotary_emb": "image_rotary_emb", "attention_mask": "attention_mask"}


class MotifVideo(HunyuanImage):
    """Some blocks look at the text once more, between the gated residual and the norm."""

    def between(self, given: Given, x: Tensor, image: Opened, text: Opened, branches: Sequence[Tensor]) -> Stream:
        stream = super().between(given, x, image, text, branches)
        if self.cross_attn is None:
            return stream
        crossed = self.cross_attn(
            hidden_states=branches[0],
            encoder_hidden_states=text[0],
            **self.keywords(given),
            image_embed_seq_len=given["image_embed_seq_len"],
        )
        return Stream(self.closed(stream), crossed)


class CogView4(Joint):
    """One module norms both streams, and one MLP takes each of them."""

    mlps: ClassVar[Paths] = ("ff", "ff")
    attention = "attn1"
    passed: ClassVar[Mapping[str, str]] = {"image_rotary_emb": "image_rotary_emb", "attention_mask": "attention_mask"}
    spread: ClassVar[str | None] = "attention_kwargs"
    text_first = False

    def opened(self, given: Given) -> tuple[Opened, Opened]:
        both = self.norm1(given["hidden_states"], given["encoder_hidden_states"], given[self.condition[0]])
        return both[:5], both[5:]


class GlmImage(CogView4):
    passed: ClassVar[Mapping[str, str]] = {**CogView4.passed, "kv_cache": "kv_cache"}

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return super().rest(draw) | {"kv_cache": None}


class CogView3Plus(CogView4):
    """The MLP takes both streams at once, the text first."""

    passed: ClassVar[Mapping[str, str]] = {}
    spread: ClassVar[str | None] = None
    condition = ("emb", "norm1")
    clipped = ("image", "text")

    def transformed(self, h: Tensor, hc: Tensor) -> tuple[Tensor, Tensor]:
        return at_once(self.ff, h, hc)


def at_once(mlp: Any, h: Tensor, hc: Tensor) -> tuple[Tensor, Tensor]:
    """What an MLP makes of two streams, text before image."""
    length = hc.shape[1]
    both = mlp(torch.cat([hc, h], dim=1))
    return both[:, length:], both[:, :length]


class CogVideoX(Joint):
    """Both streams share each of their norms, which come with their linears."""

    attention = "attn1"
    norms: ClassVar[Paths] = ("norm2.norm",)
    spread: ClassVar[str | None] = "attention_kwargs"
    text_first = False

    def fused(self, given: Given) -> Any:
        x, context, temb = given["hidden_states"], given["encoder_hidden_states"], given["temb"]
        h, hc, gate, c_gate = self.norm1(x, context, temb)
        branch, c_branch = self.attended(given, h, hc)
        image, text = norms.of_one_norm(self.norm2, temb)
        x, h = self.normed(Stream(x, branch, gate_of(gate)), "norm2.norm", *image[:2])
        context, hc = self.normed(Stream(context, c_branch, gate_of(c_gate)), "norm2.norm", *text[:2])
        f, fc = self.transformed(h, hc)
        return self.closed(Stream(x, f, image[2])), self.closed(Stream(context, fc, text[2]))

    def transformed(self, h: Tensor, hc: Tensor) -> tuple[Tensor, Tensor]:
        return at_once(self.ff, h, hc)


def gate_of(gate: Tensor) -> Tensor:
    """A gate (B, D), given as that or as (B, 1, D)."""
    return gate.squeeze(1) if gate.dim() == 3 else gate


class ConsisID(CogVideoX):
    spread: ClassVar[str | None] = None


class EasyAnimate(ConsisID):
    """Each stream has an MLP, and may have a norm of its branch."""

    probed: ClassVar[Paths] = (*CogVideoX.probed, "txt_ff")

    def transformed(self, h: Tensor, hc: Tensor) -> tuple[Tensor, Tensor]:
        norm3 = self.norm3 if self.norm3 is not None else nn.Identity()
        of_text: Any = self.ff if self.txt_ff is None else self.txt_ff
        return norm3(self.ff(h)), norm3(of_text(hc))


# ---- Two streams whose norms are plain -------------------------------------------------------------------------------


class Plain(Joint):
    """A block that makes its own vectors: three for each norm.

    Attributes:
        norms: the first norms of image and text, then the second ones.
    """

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual_norm", "gated_residual")

    def opened(self, given: Given) -> tuple[Opened, Opened]:
        streams = (given["hidden_states"], given["encoder_hidden_states"])
        image, text = (self._normed_first(x, path, vectors) for x, path, vectors in zip(streams, self.norms, self.vectors(given)))
        return image, text

    def _normed_first(self, x: Tensor, path: str, vectors: Sequence[Tensor]) -> Opened:
        shift, scale, *rest = vectors
        _, h = self.normed(Stream(x), path, shift, scale)
        return h, *rest

    def vectors(self, given: Given) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Those of the image and of the text: shift, scale and gate of the attention and of the MLP."""
        raise NotImplementedError


class QwenImage(Plain):
    norms: ClassVar[Paths] = ("img_norm1", "txt_norm1", "img_norm2", "txt_norm2")
    mlps: ClassVar[Paths] = ("img_mlp", "txt_mlp")
    probed: ClassVar[Paths] = ("attn", "img_mlp", "txt_mlp")
    passed: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states_mask": "encoder_hidden_states_mask",
        "image_rotary_emb": "image_rotary_emb",
    }
    spread: ClassVar[str | None] = "joint_attention_kwargs"
    condition = ("temb", "img_mod")
    clipped = ("image", "text")

    def fits(self, given: Given) -> bool:
        return given["modulate_index"] is None and not self.zero_cond_t and super().fits(given)

    def vectors(self, given: Given) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self.img_mod(given["temb"]).chunk(6, dim=-1), self.txt_mod(given["temb"]).chunk(6, dim=-1)


class JoyImage(Plain):
    norms: ClassVar[Paths] = QwenImage.norms
    mlps: ClassVar[Paths] = QwenImage.mlps
    probed: ClassVar[Paths] = QwenImage.probed
    text_first = False

    def fits(self, given: Given) -> bool:
        temb = given["temb"]
        return isinstance(temb, Tensor) and temb.dim() == 3 and super().fits({**given, "temb": temb[:, 0]})

    def vectors(self, given: Given) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self.img_mod(given["temb"]), self.txt_mod(given["temb"])

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        image, text = cls.streams(part, draw)
        temb = draw.normal(draw.batch, 6, image.shape[-1])
        return {"hidden_states": image, "encoder_hidden_states": text, "temb": temb, **cls.rest(draw)}


class Flux2(Plain):
    """The vectors are those of all blocks, (B, 6 D) for each stream."""

    norms: ClassVar[Paths] = ("norm1", "norm1_context", "norm2", "norm2_context")
    spread: ClassVar[str | None] = "joint_attention_kwargs"
    clipped = ("text",)

    def fits(self, given: Given) -> bool:
        streams = (given["hidden_states"], given["encoder_hidden_states"])
        return all(rows_and_vectors(x, flat_vectors(given[name])) for x in streams for name in ("temb_mod_img", "temb_mod_txt"))

    def vectors(self, given: Given) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        image, text = (flat_vectors(given[name]).chunk(6, dim=-1) for name in ("temb_mod_img", "temb_mod_txt"))
        return image, text

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        image, text = cls.streams(part, draw)
        vectors = {name: draw.normal(draw.batch, 6 * image.shape[-1]) for name in ("temb_mod_img", "temb_mod_txt")}
        return {"hidden_states": image, "encoder_hidden_states": text, **vectors, **cls.rest(draw)}


def flat_vectors(vectors: Tensor) -> Tensor:
    """(B, C) of vectors given as that or as (B, 1, C); others as they are."""
    return vectors[:, 0] if vectors.dim() == 3 and vectors.shape[1] == 1 else vectors


class HiDream(Plain):
    norms: ClassVar[Paths] = ("norm1_i", "norm1_t", "norm3_i", "norm3_t")
    mlps: ClassVar[Paths] = ("ff_i", "ff_t")
    probed: ClassVar[Paths] = ("attn1", "ff_i", "ff_t")
    attention = "attn1"
    condition = ("temb", "adaLN_modulation")
    text_first = False

    def attended(self, given: Given, h: Tensor, hc: Tensor | None = None) -> Any:
        context = () if hc is None else (hc,)
        return self.attn1(h, given["hidden_states_masks"], *context, image_rotary_emb=given["image_rotary_emb"])

    def vectors(self, given: Given) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        vectors = self.adaLN_modulation(given["temb"]).chunk(12, dim=-1)
        return vectors[:6], vectors[6:]

    @classmethod
    def rest(cls, draw: proof.Draw) -> dict[str, Any]:
        return super().rest(draw) | {"hidden_states_masks": draw.normal(draw.batch, 3)}


class HiDreamSingle(HiDream):
    """One stream, image and text together."""

    norms: ClassVar[Paths] = ("norm1_i", "norm3_i")

    def fits(self, given: Given) -> bool:
        return given["encoder_hidden_states"] is None and rows_and_vectors(given["hidden_states"], given["temb"])

    def fused(self, given: Given) -> Any:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(given["temb"]).chunk(6, dim=-1)
        x, h = self.normed(Stream(given["hidden_states"]), "norm1_i", shift, scale)
        x, h = self.normed(Stream(x, self.attended(given, h), gate), "norm3_i", shift_mlp, scale_mlp)
        return self.closed(Stream(x, self.ff_i(h), gate_mlp))

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        return super().drawn(part, draw) | {"encoder_hidden_states": None}
