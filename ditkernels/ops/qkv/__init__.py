"""q, k and v of packed attention: ``split_qkv``, with the gradient of the bias of the linear that made them.

Forward, views of what the linear has made, its bias added:

    q, k, v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]        (packed kv: k, v)

Backward, from dq, dk, dv as attention's backward leaves them, each at its own strides:

    dpacked = (dq, dk, dv) side by side        dbias = Σ_bn dpacked, summed in fp32 by compiled kernels

Nothing is saved. Backward reads dq, dk and dv once and writes dpacked once: six passes over (B, N, heads·head_dim), which the
stacking costs anyway. torch's own backward reads dpacked once more, three passes, to sum it up for the bias.

The linear adds the bias, in the product's epilogue, but must not be the one to differentiate it:

    packed = F.linear(x, weight, bias.detach()).unflatten(-1, (3, heads, -1))
    q, k, v = split_qkv(packed, bias)

The views come from a ``torch.autograd.Function``, since an op of torch.library may not return views of its inputs; the backward
is an op like any other. Where the bias needs no gradient they are plain views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import _native
from ditkernels.ops.compiled import asked, said
from ditkernels.ops.dispatch import (
    LIBRARY,
    backend_setting,
    compiled_alone,
    declare,
    define,
    is_plain,
    refuse_forward_ad,
    refuse_kinds,
    watched_by_torch,
)
from ditkernels.ops.spec import Given, Sizes, accumulator, check_dtype, check_tensor
from ditkernels.reference import transformed

__all__ = ["split_qkv"]

# ---- Public functions ------------------------------------------------------------------------------------------------


def split_qkv(packed: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, or k and v, as views of what a linear made; the gradient of the linear's ``bias`` comes from here.

    >>> packed = F.linear(x, qkv.weight, qkv.bias.detach()).unflatten(-1, (3, heads, -1))
    >>> q, k, v = split_qkv(packed, qkv.bias)

    Args:
        packed: (B, N, 3, heads, head_dim), or (B, N, 2, heads, head_dim) for k and v alone; any strides. The bias is in it.
        bias: (3·heads·head_dim,), or (2·heads·head_dim,). It is not read.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own; compiled kernels sum the bias' gradient in fp32.

    Returns:
        two or three views (B, N, heads, head_dim).

    Raises:
        ValueError, TypeError: a shape, dtype, device or kind of tensor that does not fit, named.
        BackendError: in backward, the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation; second derivatives.
    """
    if transformed():
        _check_whole(packed, bias)
        return reference.split_qkv(packed, bias)
    if compiled_alone():
        _check_whole(packed, bias)
        return tuple(torch.ops.ditkernels.split_qkv.default(packed, bias, asked(backend_setting())))
    function = _function(packed, bias, _Split, _ThinSplit)
    return packed.unbind(2) if function is None else function.apply(packed, bias, backend_setting())  # type: ignore[no-untyped-call]


def carry_bias(packed: Tensor, bias: Tensor) -> Tensor:
    """As :func:`split_qkv`, without splitting: for an attention whose backward writes a packed gradient, which is only summed up.

    Returns ``packed``. Raises as :func:`split_qkv`.
    """
    if compiled_alone():
        _check_whole(packed, bias)
        return torch.ops.ditkernels.carry_bias.default(packed, bias)  # type: ignore[no-any-return]
    function = _function(packed, bias, _Carry, _ThinCarry)
    return packed if function is None else function.apply(packed, bias)  # type: ignore[no-untyped-call]


Function = type[torch.autograd.Function]
_checked: set[Any] = set()  # kinds of arguments that have passed
_MEMORY = 1024


def _function(packed: Tensor, bias: Tensor, whole: Function, thin: Function) -> Function | None:
    """Checks the arguments; the autograd Function to apply, None where the bias needs no gradient."""
    if torch.compiler.is_compiling() or watched_by_torch() or not (is_plain(packed) and is_plain(bias)):
        _check_whole(packed, bias)
        return whole
    try:
        kind = (packed.shape, packed.dtype, packed.device, bias.shape, bias.dtype, bias.device)
    except RuntimeError:  # a nested tensor may have no shape
        refuse_kinds("split_qkv", packed, bias)
        raise
    if kind not in _checked:
        _check_packed(packed, bias)
        if len(_checked) >= _MEMORY:
            _checked.clear()
        _checked.add(kind)
    return thin if bias.requires_grad and torch.is_grad_enabled() else None


def _check_whole(packed: Tensor, bias: Tensor) -> None:
    refuse_kinds("split_qkv", packed, bias)
    refuse_forward_ad("split_qkv", packed, bias)
    _check_packed(packed, bias)


def _check_packed(packed: Tensor, bias: Tensor) -> None:
    check_dtype("packed", packed.dtype)
    if packed.dim() != 5 or packed.shape[2] not in (2, 3) or 0 in packed.shape[3:]:
        raise ValueError(
            f"packed: got shape {tuple(packed.shape)}, expected (B, N, 3, heads, head_dim) or (B, N, 2, heads, head_dim)"
            " with heads and head_dim at least 1"
        )
    check_tensor("bias", bias, (packed.shape[2:].numel(),), packed)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(packed: Tensor, bias: Tensor, forced: str | None) -> tuple[Tensor, ...]:
        return packed.unbind(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str | None], output: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.forced = inputs[1].dtype, inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        *dq, dk, dv = gradients
        tensors = (dq[0] if dq else None, dk, dv)
        dpacked, dbias = SPLIT_QKV_BACKWARD(tensors, (ctx.dtype,), ctx.forced or "auto")
        return dpacked, dbias, None


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(packed: Tensor, bias: Tensor) -> Tensor:
        return packed.view_as(packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor) -> tuple[Tensor, Tensor]:
        return dpacked, _summed(dpacked, ctx.dtype)


def _thin(function: Any) -> Function:
    """The Function for plain eager calls: one that has a ``setup_context`` inspects a signature at each call, for tens of us."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        function.setup_context(ctx, inputs, None)
        return function.forward(*inputs)

    none = staticmethod(torch.autograd.Function.setup_context)
    return type(function.__name__, (function,), {"forward": staticmethod(forward), "setup_context": none})


_ThinSplit, _ThinCarry = _thin(_Split), _thin(_Carry)

# An autograd Function in a graph would keep it out of the compiler's cache on disk, so a graph has an op around it, which says what
# is forced. Being composite, it may return views, and a compiler sees from inside what it is made of.
define("split_qkv(Tensor(a) packed, Tensor bias, str backend) -> Tensor(a)[]")
define("carry_bias(Tensor(a) packed, Tensor bias) -> Tensor(a)")
LIBRARY.impl("split_qkv", lambda packed, bias, text: list(_Split.apply(packed, bias, said(text))), "CompositeImplicitAutograd")
LIBRARY.impl("carry_bias", lambda packed, bias: _Carry.apply(packed, bias), "CompositeImplicitAutograd")


# ---- The backward: its declaration, and the torch backend ------------------------------------------------------------


def _check(given: Given) -> None:
    dk = given["dk"]
    if 0 in dk.shape[2:]:
        raise ValueError(f"dk: got shape {tuple(dk.shape)}; heads and head_dim must be at least 1")
    for name in ("dq", "dv"):
        value = given[name]
        if value is not None and value.dtype != dk.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}, but dk is {dk.dtype}")


def _sizes(given: Given, sizes: Sizes) -> Sizes:
    parts = 2 if given["dq"] is None else 3
    return {"P": parts, "E": parts * sizes["H"] * sizes["C"]}


SPLIT_QKV_BACKWARD = declare(
    "split_qkv_backward",
    inputs="dq: BNHC?, dk: BNHC, dv: BNHC",
    options="dtype: ScalarType",
    outputs="dpacked: BNPHC = dk, dbias: E = dtype",
    sizes=_sizes,
    check=_check,
    shards="BN",
)


def parts_of(dq: Tensor | None, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    """What is there, in the order of packing."""
    return (dk, dv) if dq is None else (dq, dk, dv)


def _summed(dpacked: Tensor, dtype: torch.dtype) -> Tensor:
    """dbias in ``dtype``."""
    return dpacked.sum((0, 1), dtype=accumulator(dpacked)).flatten().to(dtype)


@SPLIT_QKV_BACKWARD.implement("torch")
def backward(dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dpacked and dbias, which torch sums up in dpacked's dtype, as plain PyTorch does."""
    dpacked = torch.stack(parts_of(dq, dk, dv), 2).contiguous()
    return dpacked, dpacked.sum((0, 1)).flatten().to(dtype)


SPLIT_QKV_BACKWARD.implement_elsewhere("cuda", refuse=_native.refuse_cuda)
SPLIT_QKV_BACKWARD.implement_elsewhere("cpu", refuse=_native.refuse_cpu)
SPLIT_QKV_BACKWARD.implement_later("triton", f"{__name__}.triton")
