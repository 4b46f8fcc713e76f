"""The drop-in DiT: the reference's constructor, initialisation and state dict, with the forward built from the fused ops.

A block ends in a gated residual and the next begins with a norm of the sum, so the sum is left open: between blocks travel the
stream and the branch still to be added (``Stream``), and one kernel closes the residual and makes the next normed rows. A block
costs two such kernels forward and two backward, and reads only its own weights, so that FSDP2 can shard block by block.

To everybody else a block is a module from tensors to tensors. The model hands it an open stream only where nobody looks
(``carries_stream``): a block that somebody watches or has changed, and the one behind it, get and give tensors.

On a GPU the linears before a residual and before GELU leave their biases to the kernel behind them, whose backward gives the
biases' gradients: torch would read each gradient of a linear's output once more to sum it up. For the same reason qkv and kv
leave the gradients of theirs to attention, where dq, dk and dv are put side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ditkernels import ops, reference
from ditkernels.ops import _native, dispatch
from ditkernels.ops.mlp import asked_for, serves
from ditkernels.pretrained import Pretrained
from ditkernels.reference import is_dtensor, make_models

CHECKPOINTING = ("none", "selective", "full")

# What selective checkpointing keeps: results of products and attention, the costly part; norms, gates and GELU are recomputed.
_KEPT = {
    "mm",
    "addmm",
    "bmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}


# What a weight may be that a kernel reads, or its stand-in while something traces; a norm without weights holds None.
_ORDINARY = (nn.Parameter, Tensor, type(None), FakeTensor, FunctionalTensor)


class Stream(NamedTuple):
    """The residual stream (B, N, D), and a branch (B, N, D) with its bias (D,) and gate (B, D) that is still to be added to it."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    branch_bias: Tensor | None = None


def normed(
    stream: Stream,
    norm: nn.LayerNorm,
    shift: Tensor | None,
    scale: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Closes the open residual of ``stream``; returns the new x and its modulated norm in ``out_dtype``."""
    if watched(norm, nn.LayerNorm.forward):
        x = closed(stream)
        # The plain model's stream has the norm's dtype, of which ``residual_dtype`` makes another.
        rows = norm(x.to(reference.computed_dtype(norm) or x.dtype))
        return x, reference.modulate(rows, shift, scale).to(out_dtype)
    affine: dict[str, Any] = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    if stream.branch is None:
        return stream.x, ops.modulate_norm(stream.x, shift, scale, **affine, out_dtype=out_dtype)
    return ops.gated_residual_norm(
        *(stream.x, stream.branch, stream.gate, shift, scale),
        branch_bias=stream.branch_bias,
        **affine,
        out_dtype=out_dtype,
    )


def closed(stream: Stream) -> Tensor:
    """The residual stream with nothing left to add."""
    if stream.branch is None:
        return stream.x
    return ops.gated_residual(stream.x, stream.branch, stream.gate, branch_bias=stream.branch_bias)


def product(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear makes of x, and the bias that is left to be added to it."""
    if not _taken_apart(linear, x):
        return linear(x), None
    return F.linear(x, linear.weight), linear.bias


def product_with_bias(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear makes of x, its bias added, and the bias if it is left to be differentiated by the attention behind."""
    if not _taken_apart(linear, x) or linear.bias is None:
        return linear(x), None
    if not torch.is_grad_enabled() or not linear.bias.requires_grad:
        return linear(x), None
    return F.linear(x, linear.weight, linear.bias.detach()), linear.bias


def _taken_apart(linear: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether the op behind a linear takes over its bias, or the bias' gradient."""
    return _pays(x) and not watched(linear, nn.Linear.forward)


def _pays(x: Tensor) -> bool:
    """Whether an op adds a bias for less than the product before it does: compiled kernels do, plain PyTorch does not."""
    forced = dispatch.backend_setting()
    if forced is not None:
        return forced != "torch"
    return x.is_cuda or (x.is_cpu and _native.cpu_serves())


def watched(module: nn.Module, forward: Callable[..., Any] | None) -> bool:
    """Whether ``module`` must be called, with tensors, since somebody would miss its call or has changed what it does.

    This is the package's one answer to whether a layer may be read: its weights given to a kernel in place of a call. It must be
    called where it or all modules have a hook of either direction (FSDP2's, pruning's, the older weight norm's among them); where
    its forward, of its class or put on the instance, is not ``forward``, which the caller knows how to stand in for; where a
    parametrization computes its weights; and where these are neither ordinary tensors nor DTensors, such as quantised ones.
    """
    if type(module).forward is not forward or "forward" in module.__dict__ or "parametrizations" in module._modules:
        return True
    # A loop, since a generator costs as much as all the rest, for every layer of every call.
    for weight in module._parameters.values():
        if type(weight) not in _ORDINARY and not is_dtensor(weight):
            return True
    return _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def carries_stream(module: nn.Module) -> bool:
    """Whether the model may hand ``module`` an open stream, and gets one back from a block.

    A class whose forward takes streams names that forward ``streaming``. What ``torch.compile`` has wrapped counts as what is in
    it; any other wrapper is a module of its own, and gets tensors.
    """
    kind = type(module)
    forward = getattr(kind, "streaming", None)
    # By name, since importing Dynamo only to ask costs a second.
    if forward is None and kind.__name__ == "OptimizedModule":
        return not _hooked(module) and carries_stream(module._orig_mod)  # type: ignore[arg-type]
    return not watched(module, forward)


def opened(x: Tensor, linear: nn.Module, value: Tensor, gate: Tensor | None) -> Stream:
    """The stream x with the branch linear(value), gated, still to be added."""
    branch, bias = product(linear, value)
    return Stream(x, branch, gate, bias)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a linear with this weight computes in."""
    return dispatch.autocast_dtype(weight) or weight.dtype


def dtype_of_input(module: nn.Module, c: Tensor) -> torch.dtype:
    """What ``module``, which is called, takes; that of the conditioning c, which linears have made, where no weight of it tells."""
    return dispatch.autocast_dtype(c) or reference.computed_dtype(module) or c.dtype


def kept_alone(vector: Tensor) -> Tensor:
    """A vector, one of several chunks of a tensor, as backward may keep it.

    A frozen one is copied, since it would keep all chunks; of one that needs a gradient plain PyTorch keeps rows besides.
    """
    return vector if vector.requires_grad or not torch.is_grad_enabled() else vector.clone()


def takes_patches(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one over square patches side by side, as ``ops.patch_embed``."""
    kernel, groups, mode = conv.kernel_size, conv.groups, conv.padding_mode
    side_by_side = conv.stride == kernel and kernel[0] == kernel[1]
    return side_by_side and (conv.padding, conv.dilation, groups, mode) == ((0, 0), (1, 1), 1, "zeros")


class PatchEmbed(reference.PatchEmbed):
    """Patches to tokens with positions in one kernel; ``residual_dtype`` is the stream's, None for the plain model's."""

    residual_dtype: torch.dtype | None = None

    def forward(self, x: Tensor, pos_embed: Tensor) -> Tensor:
        if watched(self.proj, nn.Conv2d.forward) or not takes_patches(self.proj):
            tokens = super().forward(x, pos_embed)
            return tokens.to(self.residual_dtype or tokens.dtype)
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, pos_embed, out_dtype=self.residual_dtype)


class Attention(reference.Attention):
    """Self-attention over packed qkv; ``backend`` as in ``ops.attention``."""

    backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.mixed(x))

    def mixed(self, x: Tensor) -> Tensor:
        """The heads' values, (B, N, D), before the projection."""
        qkv, bias = product_with_bias(self.qkv, x)
        packed = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        return ops.attention(packed, bias=bias, scale=self.scale, backend=self.backend)


class CrossAttention(reference.CrossAttention):
    """Attention to the context; ``backend`` as in ``ops.attention``."""

    backend: str | None = None

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.proj(self.mixed(x, context))

    def mixed(self, x: Tensor, context: Tensor) -> Tensor:
        """The heads' values, (B, N, D), before the projection."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        kv, bias = product_with_bias(self.kv, context)
        return ops.attention(q, kv.unflatten(-1, (2, self.num_heads, -1)), bias=bias, backend=self.backend)


class Mlp(reference.Mlp):
    """Linear, tanh-GELU, linear."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """GELU of the first linear, (B, N, 4·D)."""
        return gelu_of(self.fc1, x)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the MLP makes of x, and the bias of fc2 if it is left to be added to it."""
        return mlp_product(self.fc1, self.fc2, x)


def gelu_of(fc1: nn.Module, x: Tensor) -> Tensor:
    """tanh-GELU of what a linear makes of x."""
    made, bias = product(fc1, x)
    return F.gelu(made, approximate="tanh") if bias is None else ops.bias_gelu(made, bias)


def mlp_product(fc1: nn.Module, fc2: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What an MLP of two linears makes of x, and the bias of fc2 if it is left to be added to it."""
    if asked_for(x.device) and _taken_apart(fc1, x) and _taken_apart(fc2, x) and _served_as_one(fc1, fc2, x):
        return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight), fc2.bias
    return product(fc2, gelu_of(fc1, x))


def _served_as_one(fc1: nn.Linear, fc2: nn.Linear, x: Tensor) -> bool:
    hidden, width = fc1.weight.shape
    return serves(x.device, compute_dtype(fc1.weight), width, hidden, fc2.weight.shape[0])


class Fused(reference.Block):
    """Gives a block of the reference the attentions and the MLP of this file; a subclass says what :meth:`computed` is.

    With ``selective`` the results of products and attention are kept for backward and the rest is computed again. That is said in
    here, and not around the block, so that a compiled block (``block.compile()``) is compiled together with it.
    """

    attention_class: ClassVar[type[reference.Attention]] = Attention
    cross_attention_class: ClassVar[type[reference.CrossAttention]] = CrossAttention
    mlp_class: ClassVar[type[reference.Mlp]] = Mlp
    attn: Attention
    cross_attn: CrossAttention
    mlp: Mlp
    selective: bool = False

    def forward(self, x: Tensor | Stream, c: Tensor) -> Any:  # type: ignore[override]
        """As the reference's block, from tokens and conditioning to tokens. Given an open stream, it returns one."""
        if isinstance(x, Stream):
            return self._open(x, c)
        return closed(self._open(Stream(x), c))

    streaming = forward

    def _open(self, stream: Stream, c: Tensor) -> Stream:
        if not self.selective or not torch.is_grad_enabled():
            return self.computed(stream, c)
        keep = partial(create_selective_checkpoint_contexts, _selective_policy)
        if not torch.compiler.is_compiling():
            keep = partial(ops.remembered, keep)
        return checkpoint(self.computed, stream, c, use_reentrant=False, context_fn=keep)

    def computed(self, stream: Stream, c: Tensor) -> Stream:
        """The stream behind the block, its last branch still to be added, without checkpointing; c: the conditioning."""
        raise NotImplementedError

    def dtype_of_rows(self, c: Tensor) -> torch.dtype:
        """What attention and MLP take their normed rows in; c: the conditioning."""
        qkv = getattr(self.attn, "qkv", None)
        if qkv is not None and not watched(qkv, nn.Linear.forward):
            return compute_dtype(qkv.weight)
        return dtype_of_input(self.attn, c)

    def attended(self, x: Tensor, h: Tensor, gate: Tensor | None = None) -> Stream:
        """The stream with the self-attention of h still to be added."""
        if watched(self.attn, Attention.forward):
            return Stream(x, self.attn(h), gate)
        return opened(x, self.attn.proj, self.attn.mixed(h), gate)

    def crossed(self, x: Tensor, h: Tensor, context: Tensor) -> Stream:
        """The stream with the cross-attention of h to ``context`` still to be added."""
        if watched(self.cross_attn, CrossAttention.forward):
            return Stream(x, self.cross_attn(h, context), None)
        return opened(x, self.cross_attn.proj, self.cross_attn.mixed(h, context), None)

    def transformed(self, x: Tensor, h: Tensor, gate: Tensor | None = None) -> Stream:
        """The stream with the MLP of h still to be added, also by the next block."""
        if watched(self.mlp, Mlp.forward):
            return Stream(x, self.mlp(h), gate)
        # As one op the MLP would be kept or recomputed as one; selective checkpointing keeps its products and recomputes GELU.
        branch, bias = product(self.mlp.fc2, self.mlp.hidden(h)) if self.selective else self.mlp.product(h)
        return Stream(x, branch, gate, bias)


class DiTBlock(Fused, reference.DiTBlock):  # type: ignore[misc]
    """The adaLN-Zero block on an open stream."""

    def computed(self, stream: Stream, c: Tensor) -> Stream:
        dtype = self.dtype_of_rows(c)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x, h = normed(stream, self.norm1, shift_msa, scale_msa, dtype)
        x, h = normed(self.attended(x, h, gate_msa), self.norm2, shift_mlp, scale_mlp, dtype)
        return self.transformed(x, h, gate_mlp)


class AdaLNBlock(Fused, reference.AdaLNBlock):  # type: ignore[misc]
    """The adaLN block on an open stream."""

    def computed(self, stream: Stream, c: Tensor) -> Stream:
        dtype = self.dtype_of_rows(c)
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x, h = normed(stream, self.norm1, shift_msa, kept_alone(scale_msa), dtype)
        x, h = normed(self.attended(x, h), self.norm2, shift_mlp, kept_alone(scale_mlp), dtype)
        return self.transformed(x, h)


class CrossAttentionBlock(Fused, reference.CrossAttentionBlock):  # type: ignore[misc]
    """The cross-attention block on an open stream."""

    def computed(self, stream: Stream, c: Tensor) -> Stream:
        dtype = self.dtype_of_rows(c)
        x, h = normed(stream, self.norm1, None, None, dtype)
        x, h = normed(self.attended(x, h), self.norm_cross, None, None, dtype)
        x, h = normed(self.crossed(x, h, c), self.norm2, None, None, dtype)
        return self.transformed(x, h)


class InContextBlock(Fused, reference.InContextBlock):  # type: ignore[misc]
    """The in-context block on an open stream."""

    def computed(self, stream: Stream, c: Tensor) -> Stream:
        dtype = self.dtype_of_rows(c)
        x, h = normed(stream, self.norm1, None, None, dtype)
        x, h = normed(self.attended(x, h), self.norm2, None, None, dtype)
        return self.transformed(x, h)


class FinalLayer(reference.FinalLayer):
    """The last residual, norm, modulation, linear and unpatchify in one kernel; takes tokens or an open stream."""

    def forward(self, x: Tensor | Stream, c: Tensor, grid: tuple[int, int]) -> Tensor:
        """As the reference's."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        norm = self.norm_final
        stream = x if isinstance(x, Stream) else Stream(x)
        if watched(self.linear, nn.Linear.forward) or watched(norm, nn.LayerNorm.forward):
            _, h = normed(stream, norm, shift, scale, dtype_of_input(self.linear, c))
            return ops.unpatchify(self.linear(h), grid=grid, patch_size=self.patch_size)
        return _final(stream, shift, kept_alone(scale), self.linear, grid, self.patch_size, eps=norm.eps)

    streaming = forward


class PlainFinalLayer(reference.PlainFinalLayer):
    """The last residual, affine norm, linear and unpatchify in one kernel; takes tokens or an open stream."""

    def forward(self, x: Tensor | Stream, c: Tensor, grid: tuple[int, int]) -> Tensor:
        """As the reference's."""
        norm = self.norm_final
        stream = x if isinstance(x, Stream) else Stream(x)
        if watched(self.linear, nn.Linear.forward) or watched(norm, nn.LayerNorm.forward):
            _, h = normed(stream, norm, None, None, dtype_of_input(self.linear, c))
            return ops.unpatchify(self.linear(h), grid=grid, patch_size=self.patch_size)
        affine = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        return _final(stream, None, None, self.linear, grid, self.patch_size, **affine)

    streaming = forward


def _final(
    stream: Stream,
    shift: Tensor | None,
    scale: Tensor | None,
    linear: nn.Linear,
    grid: tuple[int, int],
    patch_size: int,
    **affine: Any,
) -> Tensor:
    return ops.final_layer(
        stream.x,
        shift,
        scale,
        linear.weight,
        linear.bias,
        grid=grid,
        patch_size=patch_size,
        branch=stream.branch,
        gate=stream.gate,
        branch_bias=stream.branch_bias,
        **affine,
    )


class DiT(Pretrained):
    """``reference.DiT`` on fused ops: same constructor, initialisation, state dict and outputs.

    Args:
        conditioning, and all positional arguments: as in ``reference.DiT``.
        residual_dtype: of the residual stream; None keeps what the plain model would have (fp32 under autocast).
        attention_backend: as ``backend`` in ``ditkernels.ops.attention``.
        checkpointing: "none"; "selective" keeps products and attention and recomputes the rest in backward; "full" keeps
            only each block's input.

    Raises:
        ValueError: as ``reference.DiT``; an unknown attention backend or checkpointing.
    """

    embed_class: ClassVar[type[reference.PatchEmbed]] = PatchEmbed
    x_embedder: PatchEmbed
    block_classes: ClassVar[dict[str, type[nn.Module]]] = {
        "adaln_zero": DiTBlock,
        "adaln": AdaLNBlock,
        "cross_attention": CrossAttentionBlock,
        "in_context": InContextBlock,
    }
    final_classes: ClassVar[dict[str, type[nn.Module]]] = {
        "adaln_zero": FinalLayer,
        "adaln": FinalLayer,
        "cross_attention": PlainFinalLayer,
        "in_context": PlainFinalLayer,
    }

    def __init__(
        self,
        *args: Any,
        residual_dtype: torch.dtype | None = None,
        attention_backend: str | None = None,
        checkpointing: str = "none",
        **kwargs: Any,
    ) -> None:
        _check_checkpointing(checkpointing)
        if attention_backend not in (None, "auto", *dispatch.ATTENTION_BACKENDS):
            allowed = ", ".join(("auto", *dispatch.ATTENTION_BACKENDS))
            raise ValueError(f"attention_backend: got {attention_backend!r}, allowed are {allowed}")
        super().__init__(*args, **kwargs)
        self.checkpointing = checkpointing
        self.x_embedder.residual_dtype = residual_dtype
        for module in self.modules():
            if isinstance(module, (Attention, CrossAttention)):
                module.backend = attention_backend

    @property
    def checkpointing(self) -> str:
        """What is computed again in backward; may be set at any time. ValueError as of the constructor."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: str) -> None:
        _check_checkpointing(value)
        self._checkpointing = value
        for block in self.blocks:
            block.selective = value == "selective"  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As ``reference.DiT.forward``; TypeError on a nested tensor, a MaskedTensor and a proxy of torch.fx.symbolic_trace."""
        dispatch.refuse_kinds("DiT", x, t, y)
        tokens, c = self.embed(x, t, y)
        stream = Stream(tokens)
        for block in self.blocks:
            stream = self._run(block, stream, c)
        if self.conditioning == "in_context":
            stream = _first_tokens(stream, self.grid[0] * self.grid[1])
        last = self.final_layer
        return self.put_together(last(stream if carries_stream(last) else closed(stream), c, self.grid))

    def _run(self, block: nn.Module, stream: Stream, c: Tensor) -> Stream:
        if self.checkpointing != "full" or not torch.is_grad_enabled():
            return block(stream, c) if carries_stream(block) else Stream(block(closed(stream), c))
        # An open residual would double what a fully checkpointed block keeps, so that it gets and gives tensors.
        if torch.compiler.is_compiling():
            return Stream(checkpoint(block, stream.x, c, use_reentrant=False))
        return Stream(checkpoint(block, stream.x, c, use_reentrant=False, context_fn=ops.remembered))


def _check_checkpointing(value: str) -> None:
    if value not in CHECKPOINTING:
        raise ValueError(f"checkpointing: got {value!r}, allowed are {', '.join(CHECKPOINTING)}")


def _first_tokens(stream: Stream, count: int) -> Stream:
    """The stream of the image's tokens, without those of the conditioning behind them."""
    branch = None if stream.branch is None else stream.branch[:, :count]
    return stream._replace(x=stream.x[:, :count], branch=branch)


def _selective_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = getattr(op, "_overloadpacket", None)
    name = kept.__name__ if kept is not None else ""
    return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


DiT_models = make_models(DiT)
DiT_XL_2, DiT_XL_4, DiT_XL_8 = (DiT_models[f"DiT-XL/{p}"] for p in (2, 4, 8))
DiT_L_2, DiT_L_4, DiT_L_8 = (DiT_models[f"DiT-L/{p}"] for p in (2, 4, 8))
DiT_B_2, DiT_B_4, DiT_B_8 = (DiT_models[f"DiT-B/{p}"] for p in (2, 4, 8))
DiT_S_2, DiT_S_4, DiT_S_8 = (DiT_models[f"DiT-S/{p}"] for p in (2, 4, 8))


# ---- What a model costs ----------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """What one forward of one sample costs.

    Attributes:
        macs: multiply-adds, the paper's unit.
        params: all parameters, the frozen position embedding among them.
    """

    macs: int
    params: int

    @property
    def flops(self) -> int:
        """A multiply and an add as two operations."""
        return 2 * self.macs


def count(model: reference.DiT) -> Count:
    """Counts one forward of one sample through ``model``, a ``DiT`` on any device; no arithmetic is done.

    The model is neither moved nor changed. A backward costs about twice as much again.
    """
    # This module of torch imports Triton where it is installed.
    from torch.utils.flop_counter import FlopCounterMode

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    x = torch.empty(1, model.in_channels, *model.input_size, device="meta")
    t = torch.empty(1, device="meta")
    y = torch.empty(1, device="meta", dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, shapes, (x, t, y))
    return Count(counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()))
