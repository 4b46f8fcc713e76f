"""The family of diffusers' ``DiTTransformer2DModel``, and copies of it.

Blocks: ``norm1`` (the embedders of timestep and label, a linear to the six vectors, a norm), ``attn1``, ``norm3``, ``ff``. The
model: ``pos_embed``, ``transformer_blocks``, ``norm_out``, ``proj_out_1``, ``proj_out_2``; its last modulation comes from the first
block's embedders.
Every block embeds timestep and label anew, and in training drops labels on its own; both stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkernels import ops
from ditkernels.accelerate import parts, proof
from ditkernels.accelerate.diffusers.block import register
from ditkernels.accelerate.example import Calls
from ditkernels.accelerate.parts import Stream
from ditkernels.accelerate.plans import (
    WITHOUT_GRADIENTS,
    Found,
    Once,
    Planned,
    found,
    joined,
    plan_mlp,
    proven,
    refuse_around,
    uncompiled,
)
from ditkernels.accelerate.refusals import (
    Refused,
    refuse_intercepted,
    refuse_random,
    require_children,
    require_plain,
)
from ditkernels.accelerate.report import Part
from ditkernels.accelerate.swap import Fused, Swap
from ditkernels.models import kept_alone
from ditkernels.ops import dispatch

SOUGHT = "transformer_blocks of norm1 (with emb and linear), attn1, norm3 and ff (diffusers' DiTTransformer2DModel)"
_CHILDREN = ("norm1", "attn1", "norm3", "ff")
_CONDITIONS = ("timestep", "class_labels")
_TOKENS = 7
_PROCESSOR = "AttnProcessor2_0"


# ---- The fused forwards ----------------------------------------------------------------------------------------------


class Attention(Fused):
    """Self-attention with separate projections. Masks, contexts and other processors go the original's way."""

    called = ("to_q", "to_k", "to_v", "to_out.0")
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList
    heads: int
    processor: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        default = type(self.processor).__name__ == _PROCESSOR and hidden_states.dim() == 3
        if not default or not self.unchanged() or parts.given(encoder_hidden_states, attention_mask, *options.values()):
            return self.as_written(hidden_states, encoder_hidden_states, attention_mask, **options)
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (project(hidden_states).unflatten(-1, (self.heads, -1)) for project in projections)
        return self.to_out[0](parts.attend(q, k, v))


class PatchEmbed(Fused):
    """Patches and positions in one op. Other sizes than its own go the original's way, which interpolates."""

    read = ("proj",)
    proj: nn.Conv2d
    pos_embed: Tensor
    height: int
    width: int

    def forward(self, latent: Tensor) -> Tensor:
        if not parts.readable(self.proj) or not self.unchanged() or not self._fits(latent):
            return self.as_written(latent)
        dtype = parts.compute_dtype(latent)
        return ops.patch_embed(latent, self.proj.weight, self.proj.bias, self.pos_embed, out_dtype=dtype)

    def _fits(self, latent: Tensor) -> bool:
        p = self.proj.kernel_size[0]
        size = (self.height * p, self.width * p)
        return self.pos_embed_max_size is None and latent.dim() == 4 and tuple(latent.shape[2:]) == size


class Block(Fused):
    """The adaLN-Zero block: two kernels between its products. Takes (B, N, D) or an open stream, and returns the same kind."""

    called = ("norm1.emb", "norm1.linear", "norm1.silu", "attn1", "ff")
    read = ("norm1.norm", "norm3")
    norm1: Any
    norm3: nn.Module
    attn1: nn.Module
    ff: nn.Module

    def forward(
        self,
        hidden_states: Tensor | Stream,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Any:
        stream = hidden_states if isinstance(hidden_states, Stream) else Stream(hidden_states)
        context = (attention_mask, encoder_hidden_states, encoder_attention_mask)
        keywords = (cross_attention_kwargs, added_cond_kwargs)
        if parts.given(*context, *keywords) or stream.x.dim() != 3 or not self.unchanged():
            x = parts.plain(stream)
            result = Stream(self.as_written(x, *context, timestep, keywords[0], class_labels, keywords[1]))
        else:
            result = self._opened(stream, timestep, class_labels)
        return result if isinstance(hidden_states, Stream) else parts.plain(result)

    streaming = forward

    @classmethod
    def introduce(cls, original: type[nn.Module], fused: type[nn.Module]) -> None:
        register(original, fused)

    def _opened(self, stream: Stream, timestep: Any, class_labels: Any) -> Stream:
        kinds = self._ditkernels["norms"]
        stream = parts.promoted(stream)
        emb = self.norm1.emb(timestep, class_labels, hidden_dtype=stream.x.dtype)
        vectors = self.norm1.linear(self.norm1.silu(emb)).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        x, h = parts.normed(stream, self.norm1.norm, kinds[0], shift_msa, scale_msa)
        open_ = Stream(x, self.attn1(h), gate_msa)
        x, h = parts.normed(open_, self.norm3, kinds[1], shift_mlp, scale_mlp)
        return parts.transformed(self.ff, x, h, gate_mlp)


class Model(Fused):
    """The whole forward, with the residual open between blocks. Checkpointed blocks go the original's way, closed."""

    called = ("pos_embed", "transformer_blocks", "transformer_blocks.0.norm1.emb", "proj_out_1")
    read = ("norm_out", "proj_out_2")
    pos_embed: nn.Module
    transformer_blocks: Any
    norm_out: nn.Module
    proj_out_1: nn.Module
    proj_out_2: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        dispatch.refuse_kinds("accelerated model", hidden_states)
        p = self._ditkernels["patch_size"]
        tokens = (hidden_states.shape[-2] // p) * (hidden_states.shape[-1] // p)
        side = int(tokens**0.5)
        if not self.unchanged() or cross_attention_kwargs is not None or side * side != tokens:
            return self.as_written(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict=return_dict)
        stream = Stream(self.pos_embed(hidden_states))
        for block in self.transformer_blocks:
            stream = parts.through(block, stream, timestep=timestep, class_labels=class_labels)
        stream = parts.promoted(stream)
        conditioning = self.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=stream.x.dtype)
        shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        end = (self.proj_out_2, (side, side), p, self.norm_out, self._ditkernels["norm"])
        image = parts.finished(stream, shift, kept_alone(scale), *end)
        return self._ditkernels["output"](sample=image) if return_dict else (image,)


# ---- Recognition -----------------------------------------------------------------------------------------------------


def is_block(module: nn.Module) -> bool:
    _, block = uncompiled("", module)
    if not all(isinstance(block._modules.get(name), nn.Module) for name in _CHILDREN):
        return False
    norm1 = block.get_submodule("norm1")
    return all(isinstance(norm1._modules.get(name), nn.Module) for name in ("emb", "linear"))


def plan(root: Any, lists: Sequence[str], calls: Calls) -> Iterator[Found]:
    """As ``public.plan``."""
    swaps: list[Swap] = []
    if isinstance(root._modules.get("pos_embed"), nn.Module):
        path, part = uncompiled("pos_embed", root.pos_embed)
        embed = found(path, lambda: _plan_embed(part, calls))
        swaps += embed[1]
        yield embed
    fused_blocks = 0
    once, tokens = Once(calls), _tokens(root)
    for path, block in ((f"{name}.{index}", block) for name in lists for index, block in enumerate(getattr(root, name))):
        path, block = uncompiled(path, block)
        for entry in once.planned(path, block, partial(_plan_block, block=block, tokens=tokens, calls=calls)):
            fused_blocks += any(swap.mixin is Block for swap in entry[1])
            yield entry
    yield found("", lambda: _plan_model(root, lists, swaps, fused_blocks, calls))


def _plan_embed(embed: Any, calls: Calls) -> Planned:
    refuse_intercepted(embed)
    parts.check_patch_embed(embed)
    for name in ("height", "width", "pos_embed_max_size", "pos_embed"):
        if not hasattr(embed, name):
            raise Refused(f"it has no {name}")
    p = embed.proj.kernel_size[0]
    shape = (embed.proj.in_channels, embed.height * p, embed.width * p)
    guess: proof.Inputs = lambda draw: ((draw.normal(draw.batch, *shape),), {})  # noqa: E731
    return ("patch_embed",), proven(embed, [Swap("", PatchEmbed)], calls.inputs(embed, guess, ("latent",)))


def _tokens(root: Any) -> int:
    """How many tokens the model's blocks are given."""
    height, width = (getattr(getattr(root, "pos_embed", None), name, None) for name in ("height", "width"))
    return height * width if isinstance(height, int) and isinstance(width, int) else _TOKENS


def _plan_block(name: str, block: Any, tokens: int, calls: Calls) -> Iterator[Found]:
    if not is_block(block):
        yield Part(name, reason=f"{type(block).__name__} has not all of {', '.join(_CHILDREN)}"), []
        return
    attn_name, attn = uncompiled(joined(name, "attn1"), block.attn1)
    yield found(attn_name, lambda: _plan_attention(attn, tokens, calls))
    ff_name, ff = uncompiled(joined(name, "ff"), block.ff)
    yield found(ff_name, lambda: plan_mlp(ff, tokens, calls))
    yield found(name, lambda: _plan_modulation(block, tokens, calls))


def _plan_attention(attn: Any, tokens: int, calls: Calls) -> Planned:
    refuse_intercepted(attn)
    refuse_random(attn)
    processor = type(getattr(attn, "processor", None)).__name__
    if processor != _PROCESSOR:
        raise Refused(f"its attention processor is {processor}, known is {_PROCESSOR}")
    for name in ("to_q", "to_k", "to_v"):
        require_plain(name, getattr(attn, name, nn.Identity()), nn.Linear)
    require_plain("to_out.0", attn.to_out[0], nn.Linear)
    width = attn.to_q.in_features
    guess: proof.Inputs = lambda draw: ((draw.normal(draw.batch, draw.tokens, width),), {})  # noqa: E731
    inputs = calls.inputs(attn, guess, ("hidden_states",))
    return ("attention",), proven(attn, [Swap("", Attention)], inputs, tokens=tokens)


def _plan_modulation(block: Any, tokens: int, calls: Calls) -> Planned:
    refuse_intercepted(block)
    refuse_random(block)
    for name in ("attn2", "norm2", "pos_embed", "fuser"):
        if getattr(block, name, None) is not None:
            raise Refused(f"it has {name}")
    width = block.norm1.linear.in_features
    norms = (("norm1.norm", block.norm1.norm), ("norm3", block.norm3))
    kinds = tuple(parts.kind_of_norm(name, norm, width) for name, norm in norms)
    classes = _classes(block)

    def guess(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (draw.rows(draw.batch, draw.tokens, width),), _conditions(draw, classes)

    inputs = calls.inputs(block, guess, ("hidden_states", *_CONDITIONS))
    swap = Swap("", Block, {"norms": kinds})
    return ("modulate_norm", "gated_residual_norm", "gated_residual"), proven(block, [swap], inputs, tokens=tokens)


def _conditions(draw: proof.Draw, classes: int) -> dict[str, Tensor]:
    return {"timestep": draw.integers(1000, draw.batch), "class_labels": draw.integers(classes, draw.batch)}


def _classes(block: Any) -> int:
    tables = [m for m in block.norm1.emb.modules() if isinstance(m, nn.Embedding)]
    if not tables:
        raise Refused("norm1.emb has no table of labels")
    return tables[0].num_embeddings


# ---- Across blocks ---------------------------------------------------------------------------------------------------


class ProbeBlock(nn.Module):
    """Stands in for a block while the model's own forward is proven, as ``public.ProbeBlock`` does."""

    def __init__(self, width: int, depth: int, norm1: nn.Module | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.ones(width) * depth)
        self.gate = nn.Parameter(torch.ones(width))
        self.norm1 = norm1
        self.calls, self.graded = 0, False

    def forward(
        self,
        hidden_states: Tensor | Stream,
        timestep: Any = None,
        class_labels: Any = None,
        **options: Any,
    ) -> Any:
        self.calls += 1
        if self.graded and not torch.is_grad_enabled():
            raise Refused(WITHOUT_GRADIENTS)
        if self.calls > 1:
            raise Refused("it runs a block more than once, as activation checkpointing does")
        if parts.given(*options.values()):
            raise Refused(f"it passes its blocks one of {', '.join(options)}")
        x = parts.plain(hidden_states) if isinstance(hidden_states, Stream) else hidden_states
        condition = (timestep % 7 - class_labels % 5).unsqueeze(1)
        result = Stream(x, torch.tanh(x * self.weight + self.bias), condition * self.gate)
        return result if isinstance(hidden_states, Stream) else parts.plain(result)

    streaming = forward


def _plan_model(root: Any, lists: Sequence[str], swaps: list[Swap], fused_blocks: int, calls: Calls) -> Planned:
    refuse_around(root, lists, "transformer_blocks", fused_blocks)
    require_children(root, "pos_embed", "norm_out", "proj_out_1", "proj_out_2")
    require_plain("proj_out_2", root.proj_out_2, nn.Linear)
    swap = Swap("", Model, _model_settings(root))
    return ("gated_residual_norm", "final_layer"), proven(root, [*swaps, swap], *_trial(root, calls))[-1:]


def _model_settings(root: Any) -> dict[str, Any]:
    output = inspect.unwrap(type(root).forward).__globals__.get("Transformer2DModelOutput")
    if output is None:
        raise Refused("its forward returns no Transformer2DModelOutput")
    width = root.proj_out_2.in_features
    kind = parts.kind_of_norm("norm_out", root.norm_out, width)
    return {"output": output, "norm": kind, "patch_size": root.pos_embed.proj.kernel_size[0]}


def _trial(root: Any, calls: Calls) -> tuple[proof.Inputs, dict[int, nn.Module]]:
    """Random inputs of the model, and probes in the place of its blocks."""
    embed, blocks = root.pos_embed, root.transformer_blocks
    width, classes = root.proj_out_2.in_features, _classes(blocks[0])
    size = [n * embed.proj.kernel_size[0] for n in (embed.height, embed.width)]
    device, dtype = proof.device_of(root), proof.dtype_of(root)
    probes = [
        ProbeBlock(width, depth, None if depth else copy.deepcopy(block.norm1)).to(device, dtype)
        for depth, block in enumerate(blocks)
    ]

    def guess(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        latents = draw.normal(draw.batch, embed.proj.in_channels, *size)
        return (latents,), _conditions(draw, classes)

    inputs = calls.inputs(root, guess, ("hidden_states", *_CONDITIONS, "return_dict"))
    return proof.counted_anew(probes, inputs), {id(blocks): nn.ModuleList(probes)}
