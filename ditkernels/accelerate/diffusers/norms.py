"""The norms that diffusers' models share: a norm, and the vectors that modulate it and what follows, all made of one condition.

Each runs as one op, so every class that holds such a norm is served here: AdaLayerNormZero (Peebles & Xie, arXiv 2212.09748),
its kin for two streams, for SD 3.5's two attentions and for parallel blocks, and the norms in front of a model's last linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ditkernels.accelerate import proof
from ditkernels.accelerate.diffusers.block import CONTEXT, ByClass, Given, Paths, at, rows_and_vectors, width_of
from ditkernels.accelerate.parts import Stream
from ditkernels.accelerate.refusals import Refused

# ---- One stream ------------------------------------------------------------------------------------------------------


class Modulated(ByClass):
    """A norm of x with (shift, scale, further vectors) of a condition; returns the norm and the further vectors.

    Attributes:
        norms: the one norm.
        x, condition: the names of the arguments.
        chunks: how many vectors there are.
        maker: the layer that makes them; what it is given is ``activated``.
    """

    norms: ClassVar[Paths] = ("norm",)
    x: ClassVar[str] = "x"
    condition: ClassVar[str] = "emb"
    chunks: ClassVar[int]
    maker: ClassVar[str] = "linear"

    def fits(self, given: Given) -> bool:
        return rows_and_vectors(given[self.x], given[self.condition])

    def fused(self, given: Given) -> Any:
        shift, scale, *further = self.vectors(given)
        h = self.modulated(given[self.x], shift, scale)
        return (h, *further) if further else h

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        """Shift, scale, and the further ones."""
        return self.get_submodule(self.maker)(self.activated(given)).chunk(self.chunks, dim=1)

    def activated(self, given: Given) -> Tensor:
        return self.silu(given[self.condition])

    def modulated(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        _, h = self.normed(Stream(x), type(self).norms[0], shift, scale)
        return h

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        return {cls.x: rows(part, draw, cls.norms[0]), cls.condition: draw.normal(draw.batch, cls.width(part))}

    @classmethod
    def width(cls, part: Any) -> int:
        """How many channels the condition has."""
        return takes(part, cls.maker)


def rows(part: nn.Module, draw: proof.Draw, path: str, length: int = 0) -> Tensor:
    """Random tokens for the norm at ``path``."""
    return draw.rows(draw.batch, length or draw.tokens, width_at(part, path))


def width_at(part: nn.Module, path: str) -> int:
    norm = at(part, path)
    if norm is None:
        raise Refused(f"it has no {path}")
    return width_of(path, norm)


def takes(part: nn.Module, path: str) -> int:
    """How many channels the first linear in the module at ``path`` takes."""
    module = at(part, path)
    linears: list[Any] = [inner for inner in (module.modules() if module is not None else ()) if hasattr(inner, "in_features")]
    if not linears:
        raise Refused(f"{path} is no linear layer")
    return int(linears[0].in_features)


class Zero(Modulated):
    """AdaLayerNormZero, without embedders of its own."""

    chunks = 6

    @classmethod
    def applies(cls, part: Any) -> bool:
        return getattr(part, "emb", None) is None


class ZeroSingle(Modulated):
    chunks = 3


class ZeroPruned(Modulated):
    """Chroma's: the vectors are the condition, (B, 6, D), made once for all blocks."""

    chunks = 6

    def fits(self, given: Given) -> bool:
        emb = given["emb"]
        return isinstance(emb, Tensor) and emb.dim() == 3 and rows_and_vectors(given["x"], emb[:, 0])

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        return given["emb"].unbind(1)

    @classmethod
    def applies(cls, part: Any) -> bool:
        return getattr(part, "emb", None) is None

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        return {"x": rows(part, draw, "norm"), "emb": draw.normal(draw.batch, cls.chunks, width_at(part, "norm"))}


class ZeroSinglePruned(ZeroPruned):
    chunks = 3


class ContinuousPruned(ZeroPruned):
    chunks = 2

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        return given["emb"].to(given["x"].dtype).unbind(1)


class DualZero(Modulated):
    """SD 3.5's: two rows of modulation over one norm."""

    chunks = 9
    x = "hidden_states"

    def fused(self, given: Given) -> Any:
        x = given["hidden_states"]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift_2, scale_2, gate_2 = self.vectors(given)
        h, h2 = self.modulated(x, shift, scale), self.modulated(x, shift_2, scale_2)
        return h, gate, shift_mlp, scale_mlp, gate_mlp, h2, gate_2


class Continuous(Modulated):
    """Scale before shift, and the condition in x's dtype."""

    chunks = 2
    condition = "conditioning_embedding"

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        scale, shift = super().vectors(given)
        return shift, scale

    def activated(self, given: Given) -> Tensor:
        return super().activated(given).to(given["x"].dtype)


class ContinuousPlain(Continuous):
    """CogView4's: the condition comes activated."""

    def activated(self, given: Given) -> Tensor:
        return given["conditioning_embedding"].to(given["x"].dtype)


class LuminaZero(Modulated):
    """Scale without shift."""

    chunks = 4

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        return None, *super().vectors(given)


class LuminaContinuous(Continuous):
    """Scale without shift, and a linear behind."""

    maker = "linear_1"

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        return None, self.linear_1(self.activated(given))

    def fused(self, given: Given) -> Any:
        h = super().fused(given)
        return h if self.linear_2 is None else self.linear_2(h)


class Shifted(Modulated):
    """AdaLayerNorm with a condition of samples: CogVideoX's last norm."""

    chunks = 2
    condition = "temb"

    @classmethod
    def applies(cls, part: Any) -> bool:
        return getattr(part, "emb", None) is None and getattr(part, "chunk_dim", 0) == 1


class Tabled(Modulated):
    """Sana's last norm: the vectors are the condition plus a table that the model keeps."""

    x = "hidden_states"
    condition = "temb"

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        table = given["scale_shift_table"]
        return (table[None] + given["temb"][:, None].to(table.device)).unbind(1)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        width = width_at(part, "norm")
        table = draw.normal(2, width)
        return {"hidden_states": rows(part, draw, "norm"), "temb": draw.normal(draw.batch, width), "scale_shift_table": table}


class TabledFrames(Tabled):
    """SanaVideo's: the condition of all frames, (B, 1, D)."""

    def fits(self, given: Given) -> bool:
        temb = given["temb"]
        return temb.dim() == 3 and temb.shape[1] == 1 and rows_and_vectors(given["hidden_states"], temb[:, 0])

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        return super().vectors({**given, "temb": given["temb"][:, 0]})

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        return {**super().drawn(part, draw), "temb": draw.normal(draw.batch, 1, width_at(part, "norm"))}


class LowRank(Modulated):
    """Cosmos's: two linears, and a condition of all blocks that is added to what they make."""

    chunks = 2
    x = "hidden_states"
    condition = "embedded_timestep"
    maker = "linear_1"

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        return low_rank(self, given["embedded_timestep"], given["temb"]).chunk(self.chunks, dim=1)

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        return {**super().drawn(part, draw), "temb": draw.normal(draw.batch, 3 * width_at(part, "norm"))}


def low_rank(norm: Any, condition: Tensor, temb: Tensor | None) -> Tensor:
    """The vectors of one of Cosmos's norms, one behind the other."""
    vectors = norm.linear_2(norm.linear_1(norm.activation(condition)))
    return vectors if temb is None else vectors + temb[..., : vectors.shape[-1]]


class LowRankZero(LowRank):
    """As ``LowRank``, with a gate, which it gives as (B, 1, D)."""

    chunks = 3

    def fused(self, given: Given) -> Any:
        h, gate = super().fused(given)
        return h, gate.unsqueeze(1)


class Final(Modulated):
    """A last layer: norm, modulation by (shift, scale), linear."""

    norms: ClassVar[Paths] = ("norm_final",)
    chunks = 2
    condition = "vec"
    maker = "adaLN_modulation"

    def activated(self, given: Given) -> Tensor:
        return given[self.condition]

    def fused(self, given: Given) -> Any:
        return self.get_submodule("linear")(super().fused(given))


class FinalOfHiDream(Final):
    x = "hidden_states"
    condition = "temb"


class FinalScaled(Final):
    """ZImage's: scale without shift."""

    condition = "c"

    def vectors(self, given: Given) -> Sequence[Tensor | None]:
        return None, self.adaLN_modulation(given["c"])

    def fits(self, given: Given) -> bool:
        return given["noise_mask"] is None and super().fits(given)


# ---- Two streams -----------------------------------------------------------------------------------------------------


class Both(ByClass):
    """Norms of an image and of its text, with (shift, scale, further vectors) for each.

    Attributes:
        names: the arguments: image, text, condition.
        order: where, among the vectors of the linear, those of the image and those of the text stand.
        gates: whether the further vectors are returned as (B, 1, D).
    """

    fuses: ClassVar[Paths] = ("modulate_norm",)
    norms: ClassVar[Paths] = ("norm", "norm_context")
    names: ClassVar[tuple[str, str, str]] = ("hidden_states", "encoder_hidden_states", "temb")

    def fits(self, given: Given) -> bool:
        x, context, condition = (given[name] for name in self.names)
        return rows_and_vectors(x, condition) and rows_and_vectors(context, condition)

    def fused(self, given: Given) -> Any:
        x, context, condition = (given[name] for name in self.names)
        (shift, scale, *image), (c_shift, c_scale, *text) = self.vectors(condition)
        first, last = type(self).norms[0], type(self).norms[-1]
        _, h = self.normed(Stream(x), first, shift, scale)
        _, hc = self.normed(Stream(context), last, c_shift, c_scale)
        return self.returned(h, image, hc, text)

    def vectors(self, condition: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Those of the image, and those of the text."""
        vectors = self.linear(self.activated(condition)).chunk(12, dim=1)
        return vectors[:6], vectors[6:]

    def activated(self, condition: Tensor) -> Tensor:
        return self.silu(condition)

    def returned(self, h: Tensor, image: Sequence[Tensor], hc: Tensor, text: Sequence[Tensor]) -> Any:
        return h, *image, hc, *text

    @classmethod
    def drawn(cls, part: Any, draw: proof.Draw) -> dict[str, Any]:
        tokens = (rows(part, draw, cls.norms[0]), rows(part, draw, cls.norms[-1], CONTEXT))
        return dict(zip(cls.names, (*tokens, draw.normal(draw.batch, takes(part, "linear")))))


class BothOfCogView3(Both):
    norms: ClassVar[Paths] = ("norm_x", "norm_c")
    names = ("x", "context", "emb")


class BothInTurn(Both):
    """CogView4's: the vectors of both streams in turn, and a condition that comes activated."""

    def vectors(self, condition: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        vectors = self.linear(condition).chunk(12, dim=1)
        return vectors[::2], vectors[1::2]


class BothByOne(Both):
    """EasyAnimate's: one norm for both streams."""

    norms: ClassVar[Paths] = ("norm",)

    def vectors(self, condition: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return of_one_norm(self, condition)

    def returned(self, h: Tensor, image: Sequence[Tensor], hc: Tensor, text: Sequence[Tensor]) -> Any:
        return h, hc, *image, *text


class BothByOneOpen(BothByOne):
    """CogVideoX's, which gives its gates as (B, 1, D)."""

    def returned(self, h: Tensor, image: Sequence[Tensor], hc: Tensor, text: Sequence[Tensor]) -> Any:
        return h, hc, *(gate.unsqueeze(1) for gate in (*image, *text))


def of_one_norm(norm: Any, condition: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Shift, scale and gate of an image and of its text, of a norm for both."""
    vectors = norm.linear(norm.silu(condition)).chunk(6, dim=1)
    return vectors[:3], vectors[3:]
