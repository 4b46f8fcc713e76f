"""The family of the public DiT code: facebookresearch/DiT, SiT, LightningDiT, and copies of them.

Blocks: ``norm1``, ``attn``, ``norm2``, ``mlp`` and ``adaLN_modulation``, whose output is (shift, scale, gate) for the attention
and for the MLP, or, without shifts, (scale, gate) twice (Peebles & Xie, arXiv 2212.09748; Yao et al., arXiv 2501.01423). The
model: ``x_embedder``, ``pos_embed``, ``t_embedder``, ``y_embedder``, ``blocks``, ``final_layer``, unpatchify; SiT and LightningDiT
then drop the second half of the channels.

The blocks stay callable on their own. Where nobody looks, the model hands them a ``Stream``, a residual that is still open, and
gets one back, so that one kernel closes the residual of a block and makes the normed rows of the next.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ditkernels import ops
from ditkernels.accelerate import parts, proof
from ditkernels.accelerate.parts import Stream
from ditkernels.accelerate.plans import Found, Planned, found, proven, refuse_around
from ditkernels.accelerate.refusals import (
    Refused,
    refuse_intercepted,
    refuse_random,
    require_children,
)
from ditkernels.accelerate.report import Part
from ditkernels.accelerate.swap import Fused, Swap
from ditkernels.models import carries_stream, kept_alone, watched
from ditkernels.ops import dispatch

SOUGHT = "blocks of norm1, attn, norm2, mlp and adaLN_modulation (DiT, SiT, LightningDiT)"
_CHILDREN = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
_TOKENS = 7


# ---- The fused forwards ----------------------------------------------------------------------------------------------


class Block(Fused):
    """The adaLN-Zero block: two kernels between its products. Takes x (B, N, D) or an open stream, and returns the same kind."""

    calls = _CHILDREN
    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, x: Tensor | Stream, c: Tensor, *rest: Any, **options: Any) -> Any:
        stream = x if isinstance(x, Stream) else Stream(x)
        rope = [*rest, *options.values()]
        if given_more_than_rope(rope, self._ditkernels) or self._changed_beside():
            result = Stream(super().forward(parts.plain(stream), c, *rest, **options))
        else:
            result = self._opened(stream, c, *rope)
        return result if isinstance(x, Stream) else parts.plain(result)

    streaming = forward

    def _opened(self, stream: Stream, c: Tensor, *rope: Any) -> Stream:
        kinds = self._ditkernels["norms"]
        (shift_msa, scale_msa, gate_msa), (shift_mlp, scale_mlp, gate_mlp) = self._modulation(c)
        x, h = parts.normed(stream, self.norm1, kinds[0], shift_msa, scale_msa)
        branch = self.attn(h, rope=rope[0]) if rope else self.attn(h)
        x, h = parts.normed(Stream(x, branch, gate_msa), self.norm2, kinds[1], shift_mlp, scale_mlp)
        return Stream(x, self.mlp(h), gate_mlp)

    def _modulation(self, c: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        if self._ditkernels["shifts"]:
            vectors = self.adaLN_modulation(c).chunk(6, dim=1)
            return vectors[:3], vectors[3:]
        vectors = self.adaLN_modulation(c).chunk(4, dim=1)
        return (None, *vectors[:2]), (None, *vectors[2:])


def given_more_than_rope(rest: list[Any], settings: dict[str, Any]) -> bool:
    """Whether a block is called with arguments that its fused forward was not proven with."""
    return len(rest) > 1 or (not settings["rope"] and parts.given(*rest))


class FinalLayer(Fused):
    """Norm and modulation in one kernel, then the linear; given a stream and the grid, all of it and unpatchify in one."""

    calls = ("norm_final", "linear", "adaLN_modulation")
    norm_final: nn.Module
    linear: nn.Linear
    adaLN_modulation: nn.Module

    def forward(self, x: Tensor | Stream, c: Tensor, grid: tuple[int, int] | None = None, patch_size: int = 0) -> Tensor:
        stream = x if isinstance(x, Stream) else Stream(x)
        if self._changed_beside():
            tokens = super().forward(parts.plain(stream), c)
            return tokens if grid is None else ops.unpatchify(tokens, grid=grid, patch_size=patch_size)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        scale = kept_alone(scale)
        kind = self._ditkernels["norm"]
        if grid is not None:
            end = (self.linear, grid, patch_size, self.norm_final, kind)
            return parts.finished(stream, shift, scale, *end)
        _, h = parts.normed(stream, self.norm_final, kind, shift, scale)
        return self.linear(h)

    streaming = forward


class Model(Fused):
    """The whole forward, with the residual open between blocks. Checkpointed blocks go the original's way, closed."""

    calls = ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer", "feat_rope")
    x_embedder: nn.Module
    t_embedder: nn.Module
    y_embedder: nn.Module
    blocks: nn.ModuleList
    final_layer: nn.Module
    pos_embed: Tensor
    unpatchify: Any

    def forward(self, x: Tensor, t: Any = None, y: Any = None, *rest: Any, **options: Any) -> Any:
        dispatch.refuse_kinds("accelerated model", x)
        flags = (getattr(self, name, False) for name in ("use_checkpoint", "gradient_checkpointing"))
        if t is None or y is None or rest or options or any(flags) or self._changed_beside():
            supplied = [value for value in (t, y) if value is not None]
            return super().forward(x, *supplied, *rest, **options)
        settings = self._ditkernels
        stream = Stream(self._tokens(x))
        training = (self.training,) if settings["train_argument"] else ()
        c = self.t_embedder(t) + self.y_embedder(y, *training)
        rope = (self.feat_rope,) if settings["rope"] else ()
        for block in self.blocks:
            stream = parts.through(block, stream, c, *rope)
        image = self._image(stream, c, x.shape)
        return image.chunk(2, dim=1)[0] if settings["half"] else image

    def _tokens(self, x: Tensor) -> Tensor:
        if not watched(self.x_embedder, parts.PatchEmbed.forward):
            return self.x_embedder(x, self.pos_embed)
        return self.x_embedder(x) + self.pos_embed

    def _image(self, stream: Stream, c: Tensor, shape: torch.Size) -> Tensor:
        if not self._ditkernels["patch_size"] or not carries_stream(self.final_layer):
            return self.unpatchify(self.final_layer(parts.plain(stream), c))
        p = self._ditkernels["patch_size"]
        return self.final_layer(stream, c, (shape[2] // p, shape[3] // p), p)


# ---- Recognition -----------------------------------------------------------------------------------------------------


def is_block(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in _CHILDREN)


def plan(root: Any, blocks: str) -> Iterator[Found]:
    """Every part of a model of this family, with the swaps that fuse it; ``blocks`` is the attribute that holds the list."""
    rope = getattr(root, "feat_rope", None)
    embed = found("x_embedder", lambda: _plan_embed(root)) if hasattr(root, "x_embedder") else None
    if embed:
        yield embed
    seen: set[int] = set()
    fused_blocks = 0
    for index, block in enumerate(getattr(root, blocks)):
        if id(block) not in seen:
            seen.add(id(block))
            for entry in _plan_block(f"{blocks}.{index}", block, rope):
                fused_blocks += any(swap.mixin is Block for swap in entry[1])
                yield entry
    final = found("final_layer", lambda: _plan_final(root)) if hasattr(root, "final_layer") else None
    if final:
        yield final
    swaps = [swap for entry in (embed, final) if entry for swap in entry[1]]
    yield found("", lambda: _plan_model(root, blocks, swaps, fused_blocks))


def _plan_attention(attn: Any, rope: Any) -> Planned:
    refuse_intercepted(attn)
    refuse_random(attn)
    normed = parts.check_attention(attn)
    width, rotary = attn.qkv.in_features, rope is not None and _takes(attn, "rope")
    length = _rope_length(rope) if rotary else _TOKENS

    def inputs(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (draw.normal(3, length, width), *_moved(rope if rotary else None, draw)), {}

    mixin = parts.NormedAttention if normed or rotary else parts.PackedAttention
    return ("attention",), proven(attn, [Swap("", mixin, {"rope": rotary})], inputs)


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _moved(rope: Any, draw: proof.Draw) -> tuple[nn.Module, ...]:
    return () if rope is None else (proof.moved(rope, draw),)


def _plan_embed(root: Any) -> Planned:
    embed = root.x_embedder
    refuse_intercepted(embed)
    parts.check_patch_embed(embed)
    size = getattr(embed, "img_size", None)
    if size is None:
        raise Refused("it has no img_size")
    channels = embed.proj.in_channels
    inputs: proof.Inputs = lambda draw: ((draw.normal(2, channels, *size),), {})  # noqa: E731
    return ("patch_embed",), proven(embed, [Swap("", parts.PatchEmbed)], inputs)


def _plan_block(name: str, block: Any, rope: Any) -> Iterator[Found]:
    if not is_block(block):
        missing = ", ".join(c for c in _CHILDREN if not isinstance(getattr(block, c, None), nn.Module))
        yield Part(name, reason=f"{type(block).__name__} has no {missing}"), []
        return
    yield found(f"{name}.attn", lambda: _plan_attention(block.attn, rope))
    yield Part(f"{name}.mlp", reason=f"no op covers it, it is called as it is ({_described(block.mlp)})"), []
    yield found(name, lambda: _plan_modulation(block, rope))


def _described(mlp: Any) -> str:
    inner = ", ".join(str(m) for m in mlp.children() if not isinstance(m, (nn.Linear, nn.Dropout, nn.Identity)))
    return f"{type(mlp).__name__}: {inner}" if inner else type(mlp).__name__


def _plan_modulation(block: Any, rope: Any) -> Planned:
    refuse_intercepted(block)
    refuse_random(block)
    width = _width(block.adaLN_modulation)
    chunks = _out_features(block.adaLN_modulation) // width
    if chunks not in (4, 6):
        raise Refused(f"adaLN_modulation gives {chunks} vectors, known are 6 and, without shifts, 4")
    takes_rope = rope is not None and _takes(block, "feat_rope")
    norms = tuple(parts.kind_of_norm(key, getattr(block, key), width) for key in ("norm1", "norm2"))
    length = _rope_length(rope) if takes_rope else _TOKENS

    def inputs(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = (draw.rows(3, length, width), draw.normal(3, width))
        return (*arguments, *_moved(rope if takes_rope else None, draw)), {}

    swap = Swap("", Block, {"norms": norms, "shifts": chunks == 6, "rope": takes_rope})
    return ("modulate_norm", "gated_residual_norm", "gated_residual"), proven(block, [swap], inputs)


def _linears(module: nn.Module) -> list[Any]:
    linears = [m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    if not linears:
        raise Refused("adaLN_modulation has no linear layer")
    return linears


def _width(modulation: Any) -> int:
    return int(_linears(modulation)[0].in_features)


def _out_features(modulation: Any) -> int:
    return max(int(linear.out_features) for linear in _linears(modulation))


def _rope_length(rope: Any) -> int:
    """Tokens a rotary embedding is made for: the rows of its tables."""
    return next((b.shape[0] for b in rope.buffers() if b.dim() == 2), _TOKENS)


def _plan_final(root: Any) -> Planned:
    layer = root.final_layer
    require_children(layer, "norm_final", "linear", "adaLN_modulation")
    refuse_intercepted(layer)
    refuse_random(layer)
    width = _width(layer.adaLN_modulation)
    swap = Swap("", FinalLayer, {"norm": parts.kind_of_norm("norm_final", layer.norm_final, width)})
    inputs: proof.Inputs = lambda draw: ((draw.rows(3, _TOKENS, width), draw.normal(3, width)), {})  # noqa: E731
    return ("modulate_norm",), proven(layer, [swap], inputs)


# ---- Across blocks ---------------------------------------------------------------------------------------------------


class ProbeBlock(nn.Module):
    """Stands in for a block while the model's own forward is proven: cheap, different at every depth, and counting its calls.

    What the blocks compute is proven block by block; what has to be shown here is that the model runs each of them once, in
    order, on nothing but the stream and c, and does nothing else with the stream in between.
    """

    def __init__(self, width: int, depth: int, rope: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.ones(width) * depth)
        self.gate = nn.Parameter(torch.ones(width))
        self.rope = rope
        self.calls = 0

    def forward(self, x: Tensor | Stream, c: Tensor, *rest: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise Refused("it runs a block more than once, as activation checkpointing does")
        if parts.given(*rest) != self.rope:
            raise Refused("it passes its blocks arguments that are not known")
        value = parts.plain(x) if isinstance(x, Stream) else x
        result = Stream(value, torch.tanh(value * self.weight + self.bias), c * self.gate)
        return result if isinstance(x, Stream) else parts.plain(result)

    streaming = forward


def _plan_model(root: Any, blocks: str, swaps: list[Swap], fused_blocks: int) -> Planned:
    refuse_around(root, blocks, "blocks", fused_blocks)
    require_children(root, "x_embedder", "t_embedder", "y_embedder", "final_layer")
    reasons = []
    for half in (False, True):
        swap = Swap("", Model, {**_model_settings(root, swaps), "half": half})
        reason = _model_disagreement(root, [*swaps, swap])
        if reason is None:
            return ("gated_residual_norm", "final_layer"), [swap]
        reasons.append(reason)
    raise Refused(min(reasons, key=lambda reason: "has shape" in reason))


def _model_settings(root: Any, swaps: list[Swap]) -> dict[str, Any]:
    fused = {swap.path for swap in swaps}
    linear = root.final_layer.linear if "final_layer" in fused else nn.Identity()
    readable = type(linear) is nn.Linear and type(linear.weight.data) is Tensor
    return {
        "train_argument": _takes(root.y_embedder, "train"),
        "rope": getattr(root, "feat_rope", None) is not None,
        "patch_size": root.x_embedder.proj.kernel_size[0] if readable and "x_embedder" in fused else 0,
    }


def _model_disagreement(root: Any, swaps: list[Swap]) -> str | None:
    size, channels = _image_size(root), _channels(root)
    classes = next((m.num_embeddings for m in root.y_embedder.modules() if isinstance(m, nn.Embedding)), 1)
    width, rope = _width(root.blocks[0].adaLN_modulation), getattr(root, "feat_rope", None) is not None
    device, dtype = proof.device_of(root), proof.dtype_of(root)
    probes = [ProbeBlock(width, depth, rope).to(device, dtype) for depth in range(len(root.blocks))]

    def inputs(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for probe in probes:
            probe.calls = 0
        x = draw.normal(3, channels, *size)
        return (x, draw.integers(1000, 3), draw.integers(classes, 3)), {}

    return proof.disagreement(root, swaps, inputs, {id(root.blocks): nn.ModuleList(probes)})


def _image_size(root: Any) -> tuple[int, int]:
    size = getattr(root.x_embedder, "img_size", None) or getattr(root, "input_size", None)
    if size is None:
        raise Refused("neither it nor its x_embedder says how large its images are")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _channels(root: Any) -> int:
    convs = [m for m in root.x_embedder.modules() if isinstance(m, nn.Conv2d)]
    if not convs:
        raise Refused("its x_embedder has no convolution")
    return convs[0].in_channels
