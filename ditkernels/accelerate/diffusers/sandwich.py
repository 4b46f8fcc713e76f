"""Blocks whose branches are normed before they are gated, as well as in front: Lumina 2, Z-Image, Mochi.

Lumina-Next (Zhuo et al., arXiv 2406.18583) calls this sandwich normalization. The gate is the tanh of a vector, and scales come
without shifts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkernels import ops
from ditkernels.accelerate import parts, proof
from ditkernels.accelerate.diffusers import norms
from ditkernels.accelerate.diffusers.block import CONTEXT, NORMS, ByClass, Given, Keeping, Paths, rows_and_vectors
from ditkernels.accelerate.parts import Stream
from ditkernels.models import watched


class Sandwich(ByClass):
    """A block whose attention and MLP have a norm in front and one behind."""

    fuses: ClassVar[Paths] = ("modulate_norm", "gated_residual_norm", "gated_residual")

    def added(self, x: Tensor, branch: Tensor, gate: Tensor | None, behind: str) -> Tensor:
        """x + gate · the norm ``behind`` of the branch."""
        given = self.norm_behind(behind)
        if given is None:
            return self.closed(Stream(x, self.get_submodule(behind)(branch), gate))
        return ops.gated_residual(parts.promoted(Stream(x, branch, gate)).x, branch, gate, **given)

    def added_and_normed(
        self, x: Tensor, branch: Tensor, gate: Tensor | None, behind: str, norm: str, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same, and its ``norm``, modulated."""
        given, layer, kind = self.norm_behind(behind), self.get_submodule(norm), self._ditkernels[NORMS][norm]
        if given is None:
            return self.normed(Stream(x, self.get_submodule(behind)(branch), gate), norm, None, scale)
        if watched(layer, kind.found_on.forward):
            return self.normed(Stream(self.added(x, branch, gate, behind)), norm, None, scale)
        x = parts.promoted(Stream(x, branch, gate)).x
        given = {**given, **parts.norm_arguments(layer, kind), "out_dtype": self.dtype_normed(x)}
        return ops.gated_residual_norm(x, branch, gate, None, scale, **given)

    def norm_behind(self, path: str) -> dict[str, Any] | None:
        """A branch's norm as the ops take it; None where it is called."""
        norm, kind = self.get_submodule(path), self._ditkernels[NORMS][path]
        given = parts.norm_arguments(norm, kind)
        if watched(norm, kind.found_on.forward) or given["norm"] != "rmsnorm" or given["bias"] is not None:
            return None
        return {"branch_norm": given["norm"], "branch_weight": given["weight"], "branch_eps": given["eps"]}

    def dtype_normed(self, x: Tensor) -> torch.dtype | None:
        """Of the norm of x in front of the MLP; None for that of autocast or of x."""
        return None


class Lumina2(Sandwich):
    """A block without modulation, for the text, has a plain norm in front."""

    norms: ClassVar[Paths] = ("norm1", "ffn_norm1", "norm2", "ffn_norm2")
    probed: ClassVar[Paths] = ("attn", "feed_forward")

    @classmethod
    def norms_of(cls, part: Any) -> Paths:
        return cls.norms[1:] if part.modulation else cls.norms

    def fits(self, given: Given) -> bool:
        x, temb = given["hidden_states"], given["temb"]
        return rows_and_vectors(x, temb) if self.modulation else isinstance(x, Tensor) and x.dim() == 3

    def fused(self, given: Given) -> Any:
        x = given["hidden_states"]
        scale = gate = gate_mlp = None
        if self.modulation:
            h, gate, scale, gate_mlp = self.norm1(x, given["temb"])
            gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
        else:
            _, h = self.normed(Stream(x), "norm1")
        options = {name: given[name] for name in ("attention_mask", "image_rotary_emb")}
        branch = self.attn(hidden_states=h, encoder_hidden_states=h, **options)
        x, h = self.added_and_normed(x, branch, gate, "norm2", "ffn_norm1", scale)
        return self.added(x, self.feed_forward(h), gate_mlp, "ffn_norm2")

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = norms.rows(part, draw, "norm2")
        temb = draw.normal(draw.batch, norms.takes(part, "norm1.linear")) if part.modulation else None
        rotary = draw.normal(draw.batch, draw.tokens, 4)
        return {"hidden_states": x, "attention_mask": None, "image_rotary_emb": rotary, "temb": temb}


class ZImage(Sandwich):
    """A call with a mask of noise has vectors by an index, and takes the original's way."""

    norms: ClassVar[Paths] = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
    probed: ClassVar[Paths] = ("attention", "feed_forward")

    def fits(self, given: Given) -> bool:
        x, condition = given["x"], given["adaln_input"]
        if not self.modulation:
            return isinstance(x, Tensor) and x.dim() == 3
        return given["noise_mask"] is None and rows_and_vectors(x, condition)

    def fused(self, given: Given) -> Any:
        x = given["x"]
        scale = gate = scale_mlp = gate_mlp = None
        if self.modulation:
            scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(given["adaln_input"]).chunk(4, dim=1)
            gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
        _, h = self.normed(Stream(x), "attention_norm1", None, scale)
        branch = self.attention(h, attention_mask=given["attn_mask"], freqs_cis=given["freqs_cis"])
        x, h = self.added_and_normed(x, branch, gate, "attention_norm2", "ffn_norm1", scale_mlp)
        return self.added(x, self.feed_forward(h), gate_mlp, "ffn_norm2")

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = norms.rows(part, draw, "attention_norm1")
        condition = draw.normal(draw.batch, norms.takes(part, "adaLN_modulation")) if part.modulation else None
        rotary = draw.normal(draw.batch, draw.tokens, 4)
        unmasked = {"noise_mask": None, "adaln_noisy": None, "adaln_clean": None}
        return {"x": x, "attn_mask": None, "freqs_cis": rotary, "adaln_input": condition, **unmasked}


# ---- Mochi: norms without weights, in fp32 whatever the stream's dtype -----------------------------------------------


class MochiZero(Keeping, norms.LuminaZero):
    x = "hidden_states"

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        width = part.linear.out_features // cls.chunks
        return {"hidden_states": draw.rows(draw.batch, draw.tokens, width), "emb": draw.normal(draw.batch, cls.width(part))}


class MochiContinuous(Keeping, norms.Continuous):
    """Scale without shift: the text's last norm."""

    maker = "linear_1"

    def vectors(self, given: Given) -> Any:
        return None, self.linear_1(self.activated(given))

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        x = draw.rows(draw.batch, draw.tokens, part.linear_1.out_features)
        return {"x": x, "conditioning_embedding": draw.normal(draw.batch, cls.width(part))}


class Mochi(Keeping, Sandwich):
    """Two streams, image and text, with one attention. In the last block the text ends there."""

    norms: ClassVar[Paths] = ("norm2", "norm3", "norm4", "norm2_context", "norm3_context", "norm4_context")
    probed: ClassVar[Paths] = ("attn1", "ff", "ff_context")
    joint: ClassVar[Paths] = ("attn1",)

    def fits(self, given: Given) -> bool:
        return all(rows_and_vectors(given[name], given["temb"]) for name in ("hidden_states", "encoder_hidden_states"))

    def fused(self, given: Given) -> Any:
        x, text, temb = given["hidden_states"], given["encoder_hidden_states"], given["temb"]
        h, *vectors = self.norm1(x, temb)
        hc = self.norm1_context(text, temb)
        hc, *text_vectors = (hc,) if self.context_pre_only else hc
        options = {"image_rotary_emb": given["image_rotary_emb"], "attention_mask": given["encoder_attention_mask"]}
        branch, text_branch = self.attn1(hidden_states=h, encoder_hidden_states=hc, **options)
        x = self.transformed(x, branch, vectors, self.ff, "")
        if not self.context_pre_only:
            text = self.transformed(text, text_branch, text_vectors, self.ff_context, "_context")
        return x, text

    def transformed(self, x: Tensor, branch: Tensor, vectors: list[Tensor], mlp: Any, which: str) -> Tensor:
        """A stream behind the attention."""
        gate, scale, gate_mlp = vectors
        x, h = self.added_and_normed(x, branch, gate.tanh(), f"norm2{which}", f"norm3{which}", scale)
        return self.added(x, mlp(h), gate_mlp.tanh(), f"norm4{which}")

    def dtype_normed(self, x: Tensor) -> torch.dtype | None:
        return x.dtype

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        image, text = part.attn1.to_q.in_features, part.attn1.add_q_proj.in_features
        return {
            "hidden_states": draw.rows(draw.batch, draw.tokens, image),
            "encoder_hidden_states": draw.rows(draw.batch, CONTEXT, text),
            "temb": draw.normal(draw.batch, norms.takes(part, "norm1.linear")),
            "encoder_attention_mask": draw.normal(draw.batch, CONTEXT),
            "image_rotary_emb": draw.normal(draw.tokens, 4),
        }
