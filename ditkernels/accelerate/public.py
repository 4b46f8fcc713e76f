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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditkernels.accelerate import parts, proof
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
)
from ditkernels.accelerate.report import Part
from ditkernels.accelerate.swap import SIGNATURE, Fused, Signature, Swap
from ditkernels.accelerate.watch import is_plain
from ditkernels.models import carries_stream, kept_alone
from ditkernels.ops import dispatch

SOUGHT = "blocks of norm1, attn, norm2, mlp and adaLN_modulation (DiT, SiT, LightningDiT)"
_CHILDREN = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
_TOKENS = 7


# ---- The fused forwards ----------------------------------------------------------------------------------------------


class Block(Fused):
    """The adaLN-Zero block: two kernels between its products. Takes x (B, N, D) or an open stream, and returns the same kind."""

    called = ("attn", "mlp", "adaLN_modulation")
    read = ("norm1", "norm2")
    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, *args: Any, **options: Any) -> Any:
        opened = isinstance(args[0] if args else None, Stream)
        proven = self._proven(args, options)
        if proven is None:
            closed = (parts.plain(args[0]), *args[1:]) if opened else args
            result = self.as_written(*closed, **options)
            return Stream(result) if opened else result
        stream = self._opened(*proven)
        return stream if opened else parts.plain(stream)

    streaming = forward

    def _proven(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
        """The stream, c and, if there is one, the rotary embedding; None outside of what was proven."""
        proven = self.proven_arguments(args, options)
        if proven is None or None in proven[2:] or not self.unchanged():
            return None
        stream = proven[0] if isinstance(proven[0], Stream) else Stream(proven[0])
        return (stream, *proven[1:]) if parts.fits(stream.x, proven[1]) else None

    def _opened(self, stream: Stream, c: Tensor, *rope: Any) -> Stream:
        kinds = self._ditkernels["norms"]
        (shift_msa, scale_msa, gate_msa), (shift_mlp, scale_mlp, gate_mlp) = self._modulation(c)
        x, h = parts.normed(stream, self.norm1, kinds[0], shift_msa, scale_msa)
        branch = self.attn(h, rope=rope[0]) if rope else self.attn(h)
        x, h = parts.normed(Stream(x, branch, gate_msa), self.norm2, kinds[1], shift_mlp, scale_mlp)
        return parts.transformed(self.mlp, x, h, gate_mlp)

    def _modulation(self, c: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        if self._ditkernels["shifts"]:
            vectors = self.adaLN_modulation(c).chunk(6, dim=1)
            return vectors[:3], vectors[3:]
        vectors = self.adaLN_modulation(c).chunk(4, dim=1)
        return (None, *vectors[:2]), (None, *vectors[2:])


class FinalLayer(Fused):
    """Norm and modulation in one kernel, then the linear; given a stream and the grid, all of it and unpatchify in one."""

    called = ("adaLN_modulation", "linear")
    read = ("norm_final",)
    norm_final: nn.Module
    linear: nn.Linear
    adaLN_modulation: nn.Module

    def forward(self, *args: Any, **options: Any) -> Any:
        if isinstance(args[0] if args else None, Stream):
            return self._finished(*args)
        proven = self.proven_arguments(args, options)
        if proven is None or not parts.fits(*proven) or not self.unchanged():
            return self.as_written(*args, **options)
        x, c = proven
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        _, h = parts.normed(Stream(x), self.norm_final, self._ditkernels["norm"], shift, kept_alone(scale))
        return self.linear(h)

    def _finished(self, stream: Stream, c: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        end = (self.linear, grid, patch_size, self.norm_final, self._ditkernels["norm"])
        return parts.finished(stream, shift, kept_alone(scale), *end)

    streaming = forward


class Model(Fused):
    """The whole forward, with the residual open between blocks. Checkpointed blocks go the original's way, closed."""

    called = ("x_embedder", "t_embedder", "y_embedder", "feat_rope", "blocks", "final_layer")
    x_embedder: nn.Module
    t_embedder: nn.Module
    y_embedder: nn.Module
    blocks: nn.ModuleList
    final_layer: nn.Module
    pos_embed: Tensor
    unpatchify: Any

    def forward(self, *args: Any, **options: Any) -> Any:
        dispatch.refuse_kinds("accelerated model", *args[:1])
        proven = self.proven_arguments(args, options)
        if proven is None or not self._fits(*proven) or not self.unchanged():
            return self.as_written(*args, **options)
        x, t, y = proven
        settings = self._ditkernels
        stream = Stream(self._tokens(x))
        training = (self.training,) if settings["train_argument"] else ()
        c = self.t_embedder(t) + self.y_embedder(y, *training)
        rest, named = settings["further"]
        rope = self.feat_rope if settings["rope"] else None
        further = [rope if is_rope else None for is_rope in rest]
        keywords = {name: rope if is_rope else None for name, is_rope in named}
        for block in self.blocks:
            stream = parts.through(block, stream, c, *further, **keywords)
        image = self._image(stream, c, x.shape)
        return image.chunk(2, dim=1)[0] if settings["half"] else image

    def _fits(self, x: Any, t: Any, y: Any) -> bool:
        """Whether these are images of the size that was proven, with timesteps and labels in the form that was."""
        if not all(isinstance(value, Tensor) for value in (x, t, y)) or (t.dim(), y.dim()) != self._ditkernels["dims"]:
            return False
        return x.dim() == 4 and tuple(x.shape[1:]) == self._ditkernels["image"]

    def _tokens(self, x: Tensor) -> Tensor:
        if parts.takes_apart(self.x_embedder, parts.PatchEmbed):
            return self.x_embedder(x, ditkernels_positions=self.pos_embed)
        return self.x_embedder(x) + self.pos_embed

    def _image(self, stream: Stream, c: Tensor, shape: torch.Size) -> Tensor:
        last: Any = self.final_layer
        as_one = self._ditkernels["patch_size"] and carries_stream(last) and parts.fits(stream.x, c) and last.unchanged()
        if not as_one:
            return self.unpatchify(self.final_layer(parts.plain(stream), c))
        p = self._ditkernels["patch_size"]
        return self.final_layer(stream, c, (shape[2] // p, shape[3] // p), p)


# ---- Recognition -----------------------------------------------------------------------------------------------------


def is_block(module: nn.Module) -> bool:
    _, block = uncompiled("", module)
    return all(isinstance(block._modules.get(name), nn.Module) for name in _CHILDREN)


def plan(root: Any, lists: Sequence[str], calls: Calls) -> Iterator[Found]:
    """Every part of a model of this family, with the swaps that fuse it.

    Args:
        root: the model.
        lists: the attributes that hold its blocks.
        calls: what its modules are given, as far as that is known.
    """
    rope, tokens = getattr(root, "feat_rope", None), _tokens(root)
    embed = _found_below(root, "x_embedder", partial(_plan_embed, calls=calls))
    yield from embed
    seen: set[int] = set()
    once = Once(calls)
    plan_block = partial(_plan_block, rope=rope, tokens=tokens, calls=calls)
    fused_blocks = 0
    for path, block in ((f"{name}.{index}", block) for name in lists for index, block in enumerate(getattr(root, name))):
        if id(block) not in seen:
            seen.add(id(block))
            path, block = uncompiled(path, block)
            for entry in once.planned(path, block, partial(plan_block, block=block)):
                fused_blocks += any(swap.mixin is Block for swap in entry[1])
                yield entry
    final = _found_below(root, "final_layer", partial(_plan_final, tokens=tokens, calls=calls))
    yield from final
    swaps = [swap for _, found_swaps in (*embed, *final) for swap in found_swaps]
    yield found("", lambda: _plan_model(root, lists, swaps, fused_blocks, calls))


def _found_below(root: nn.Module, name: str, plan_part: Callable[[Any], Planned]) -> list[Found]:
    """The one part that ``root`` has at ``name``, if it has."""
    if not isinstance(root._modules.get(name), nn.Module):
        return []
    path, part = uncompiled(name, root.get_submodule(name))
    return [found(path, lambda: plan_part(part))]


def _tokens(root: Any) -> int:
    """How many tokens the model's blocks are given: a table of positions or the patches of its images tell."""
    positions = getattr(root, "pos_embed", None)
    if isinstance(positions, Tensor) and positions.dim() == 3:
        return positions.shape[1]
    count = getattr(getattr(root, "x_embedder", None), "num_patches", None)
    return count if isinstance(count, int) else _TOKENS


def _plan_attention(attn: Any, rope: Any, tokens: int, calls: Calls) -> Planned:
    refuse_intercepted(attn)
    refuse_random(attn)
    normed = parts.check_attention(attn)
    width, rotary = attn.qkv.in_features, rope is not None and _takes(attn, "rope")
    length = _rope_length(rope, tokens) if rotary else tokens

    def guess(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (draw.normal(draw.batch, draw.tokens, width), *_moved(rope if rotary else None, draw)), {}

    mixin = parts.NormedAttention if normed or rotary else parts.PackedAttention
    signature = Signature.of(attn, 1 + rotary)
    inputs = calls.inputs(attn, guess, signature.names)
    return ("attention",), proven(attn, [Swap("", mixin, {SIGNATURE: signature})], inputs, tokens=length)


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _moved(rope: Any, draw: proof.Draw) -> tuple[nn.Module, ...]:
    return () if rope is None else (proof.moved(rope, draw),)


def _plan_embed(embed: Any, calls: Calls) -> Planned:
    refuse_intercepted(embed)
    parts.check_patch_embed(embed)
    size = getattr(embed, "img_size", None)
    if size is None:
        raise Refused("it has no img_size")
    channels = embed.proj.in_channels
    guess: proof.Inputs = lambda draw: ((draw.normal(draw.batch, channels, *size),), {})  # noqa: E731
    signature = Signature.of(embed, 1)
    inputs = calls.inputs(embed, guess, signature.names)
    return ("patch_embed",), proven(embed, [Swap("", parts.PatchEmbed, {SIGNATURE: signature})], inputs)


def _plan_block(name: str, block: Any, rope: Any, tokens: int, calls: Calls) -> Iterator[Found]:
    if not is_block(block):
        missing = ", ".join(c for c in _CHILDREN if not isinstance(getattr(block, c, None), nn.Module))
        yield Part(name, reason=f"{type(block).__name__} has no {missing}"), []
        return
    attn_name, attn = uncompiled(joined(name, "attn"), block.attn)
    yield found(attn_name, lambda: _plan_attention(attn, rope, tokens, calls))
    mlp_name, mlp = uncompiled(joined(name, "mlp"), block.mlp)
    yield found(mlp_name, lambda: plan_mlp(mlp, tokens, calls))
    yield found(name, lambda: _plan_modulation(block, rope, tokens, calls))


def _plan_modulation(block: Any, rope: Any, tokens: int, calls: Calls) -> Planned:
    refuse_intercepted(block)
    refuse_random(block)
    width = _width(block.adaLN_modulation)
    chunks = _out_features(block.adaLN_modulation) // width
    if chunks not in (4, 6):
        raise Refused(f"adaLN_modulation gives {chunks} vectors, known are 6 and, without shifts, 4")
    takes_rope = rope is not None and _takes(block, "feat_rope")
    norms = tuple(parts.kind_of_norm(key, getattr(block, key), width) for key in ("norm1", "norm2"))
    length = _rope_length(rope, tokens) if takes_rope else tokens

    def guess(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = (draw.rows(draw.batch, draw.tokens, width), draw.normal(draw.batch, width))
        return (*arguments, *_moved(rope if takes_rope else None, draw)), {}

    signature = Signature.of(block, 2 + takes_rope)
    inputs = calls.inputs(block, guess, signature.names)
    swap = Swap("", Block, {"norms": norms, "shifts": chunks == 6, SIGNATURE: signature})
    return ("modulate_norm", "gated_residual_norm", "gated_residual"), proven(block, [swap], inputs, tokens=length)


def _linears(module: nn.Module) -> list[Any]:
    linears = [m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    if not linears:
        raise Refused("adaLN_modulation has no linear layer")
    return linears


def _width(modulation: Any) -> int:
    return int(_linears(modulation)[0].in_features)


def _out_features(modulation: Any) -> int:
    return max(int(linear.out_features) for linear in _linears(modulation))


def _rope_length(rope: Any, otherwise: int) -> int:
    """Tokens a rotary embedding is made for: the rows of its tables."""
    return next((b.shape[0] for b in rope.buffers() if b.dim() == 2), otherwise)


def _plan_final(layer: Any, tokens: int, calls: Calls) -> Planned:
    require_children(layer, "norm_final", "linear", "adaLN_modulation")
    refuse_intercepted(layer)
    refuse_random(layer)
    width = _width(layer.adaLN_modulation)
    kind = parts.kind_of_norm("norm_final", layer.norm_final, width)
    signature = Signature.of(layer, 2)
    swap = Swap("", FinalLayer, {"norm": kind, SIGNATURE: signature})

    def guess(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (draw.rows(draw.batch, draw.tokens, width), draw.normal(draw.batch, width)), {}

    return ("modulate_norm",), proven(layer, [swap], calls.inputs(layer, guess, signature.names), tokens=tokens)


# ---- Across blocks ---------------------------------------------------------------------------------------------------


class ProbeBlock(nn.Module):
    """Stands in for a block while the model's own forward is proven: cheap, different at every depth, and counting its calls.

    What the blocks compute is proven block by block; what has to be shown here is that the model runs each of them once, in
    order, on nothing but the stream and c, and does nothing else with the stream in between. The block's plain attributes are here
    too, for a model that asks for them; asking for anything else of a block is more than a fused model can answer for.
    """

    def __init__(self, block: nn.Module, width: int, depth: int) -> None:
        super().__init__()
        own = vars(nn.Module())
        held = {name: value for name, value in vars(block).items() if name not in own}
        vars(self).update({name: value for name, value in held.items() if is_plain(value)})
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.ones(width) * depth)
        self.gate = nn.Parameter(torch.ones(width))
        self.hidden = (*held, *block._modules, *block._parameters, *block._buffers)
        self.signature = Signature.of(block, 2)
        self.calls, self.graded = 0, False
        self.further: Further = ((), ())

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("hidden", ()) and name not in self._parameters:
            raise Refused(f"it reads {name} of a block")
        return super().__getattr__(name)

    def forward(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.graded and not torch.is_grad_enabled():
            raise Refused(WITHOUT_GRADIENTS)
        if self.calls > 1:
            raise Refused("it runs a block more than once, as activation checkpointing does")
        for name in self.signature.names[len(args) :]:
            args = (*args, options.pop(name, None))
        x, c, *rest = args
        value = parts.plain(x) if isinstance(x, Stream) else x
        if not isinstance(c, Tensor) or c.dim() != 2:
            raise Refused(f"it gives its blocks {proof.shape_in_words(c)} for conditioning; the ops take (B, D)")
        self.further = (tuple(map(_is_rope, rest)), tuple((name, _is_rope(given)) for name, given in options.items()))
        result = Stream(value, torch.tanh(value * self.weight + self.bias), c * self.gate)
        return result if isinstance(x, Stream) else parts.plain(result)

    streaming = forward


Further = tuple[tuple[bool, ...], tuple[tuple[str, bool], ...]]
"""What a block is given besides x and c, by position and by name: whether that is the rotary embedding, or else None."""


def _is_rope(value: Any) -> bool:
    if value is not None and not isinstance(value, nn.Module):
        raise Refused(f"it gives its blocks a further argument, {proof.shape_in_words(value)}")
    return value is not None


def _plan_model(root: Any, lists: Sequence[str], swaps: list[Swap], fused_blocks: int, calls: Calls) -> Planned:
    refuse_around(root, lists, "blocks", fused_blocks)
    require_children(root, "x_embedder", "t_embedder", "y_embedder", "final_layer")
    width, device, dtype = _width(root.blocks[0].adaLN_modulation), proof.device_of(root), proof.dtype_of(root)
    probes = [ProbeBlock(block, width, depth).to(device, dtype) for depth, block in enumerate(root.blocks)]
    stand_ins: dict[int, nn.Module] = {id(root.blocks): nn.ModuleList(probes)}
    settings = _model_settings(root, swaps)
    inputs = proof.counted_anew(probes, calls.inputs(root, _guess_images(root), settings[SIGNATURE].names))
    settings |= _shapes(inputs, settings[SIGNATURE]) | {"further": _further(root, inputs, stand_ins)}
    reasons = []
    for half in (False, True):
        swap = Swap("", Model, {**settings, "half": half})
        try:
            return ("gated_residual_norm", "final_layer"), proven(root, [*swaps, swap], inputs, stand_ins)[-1:]
        except Refused as refused:
            reasons.append(str(refused))
    raise Refused(min(reasons, key=lambda reason: "has shape" in reason))


def _guess_images(root: Any) -> proof.Inputs:
    """Images, timesteps and labels as far as the modules tell what these are."""
    classes = next((m.num_embeddings for m in root.y_embedder.modules() if isinstance(m, nn.Embedding)), 1)
    whole = proof.runs(root.t_embedder, lambda draw: ((draw.integers(1000, draw.batch),), {}))

    def inputs(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = draw.normal(draw.batch, _channels(root), *_image_size(root))
        t = draw.integers(1000, draw.batch) if whole else draw.between(0, 1, draw.batch)
        return (x, t, draw.integers(classes, draw.batch)), {}

    return inputs


def _shapes(inputs: proof.Inputs, signature: Signature) -> dict[str, tuple[int, ...]]:
    """The size of the images that the model is proven on, and how many dimensions timesteps and labels have."""
    args, kwargs = inputs(proof.Draw(torch.float32, torch.device("cpu")))
    given = [*args, *(kwargs.get(name) for name in signature.names[len(args) :])]
    if not all(isinstance(value, Tensor) for value in given):
        raise Refused(
            f"it is given {', '.join(map(proof.shape_in_words, given))}; the fused forward takes images, timesteps and labels"
        )
    x, *conditions = given
    return {"image": tuple(x.shape[1:]), "dims": tuple(value.dim() for value in conditions)}


def _further(root: nn.Module, inputs: proof.Inputs, stand_ins: dict[int, nn.Module]) -> Further:
    """What the model gives its blocks besides x and c. Raises Refused where it does not give all the same."""
    seen = {probe.further for probe in proof.ran(root, inputs, stand_ins).blocks}
    if len(seen) != 1:
        raise Refused("it does not call all of its blocks in the same way")
    return seen.pop()


def _model_settings(root: Any, swaps: list[Swap]) -> dict[str, Any]:
    fused = {swap.path for swap in swaps}
    linear = root.final_layer.linear if "final_layer" in fused else nn.Identity()
    readable = type(linear) is nn.Linear and type(linear.weight.data) is Tensor
    return {
        "train_argument": _takes(root.y_embedder, "train"),
        "rope": getattr(root, "feat_rope", None) is not None,
        "patch_size": root.x_embedder.proj.kernel_size[0] if readable and "x_embedder" in fused else 0,
        SIGNATURE: Signature.of(root, 3),
    }


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
