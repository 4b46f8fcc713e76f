"""q, k and v of packed attention: ``split_qkv``, with the gradient of the bias of the linear that made them.

Forward, views of what the linear has made, its bias added:

    q, k, v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]        (packed kv: k, v)

Backward, from dq, dk, dv as attention's backward leaves them, each at its own strides:

    dpacked = (dq, dk, dv) side by side        dbias = Σ_bn dpacked, summed in fp32 (fp64 for fp64)

Nothing is saved. Backward reads dq, dk and dv once and writes dpacked once: six passes over (B, N, heads·head_dim), which the
stacking costs anyway. torch's own backward reads dpacked once more, three passes, to sum it up for the bias.

The linear adds the bias, in the product's epilogue, but must not be the one to differentiate it:

    packed = F.linear(x, weight, bias.detach()).unflatten(-1, (3, heads, -1))
    q, k, v = split_qkv(packed, bias)

The views come from a ``torch.autograd.Function``, since an op of torch.library may not return views of its inputs; the backward
is an op like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _checks as checks
from ditkernels.ops import _registry as registry
from ditkernels.ops.adaln import accumulator

# ------------------------------------------------------------------------------------------------------------------
# Public functions
# ------------------------------------------------------------------------------------------------------------------


def split_qkv(packed: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, or k and v, as views of what a linear made; the gradient of the linear's ``bias`` comes from here.

    >>> packed = F.linear(x, qkv.weight, qkv.bias.detach()).unflatten(-1, (3, heads, -1))
    >>> q, k, v = split_qkv(packed, qkv.bias)

    Args:
        packed: (B, N, 3, heads, head_dim), or (B, N, 2, heads, head_dim) for k and v alone; any strides. The bias is in it.
        bias: (3·heads·head_dim,), or (2·heads·head_dim,). It is not read.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own; the bias' gradient is summed in fp32.

    Returns:
        two or three views (B, N, heads, head_dim).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named.
        BackendError: in backward, the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation; second derivatives.
    """
    _check_packed(packed, bias)
    return _Split.apply(packed, bias)  # type: ignore[no-any-return, no-untyped-call]


def carry_bias(packed: Tensor, bias: Tensor) -> Tensor:
    """As :func:`split_qkv`, without splitting: for an attention whose backward writes a packed gradient, which is only summed up.

    Returns ``packed``. Raises as :func:`split_qkv`.
    """
    _check_packed(packed, bias)
    return _Carry.apply(packed, bias)  # type: ignore[no-any-return, no-untyped-call]


def _check_packed(packed: Tensor, bias: Tensor) -> None:
    registry.refuse_forward_ad("split_qkv", packed, bias)
    checks.dtype("packed", packed.dtype)
    if packed.dim() != 5 or packed.shape[2] not in (2, 3) or 0 in packed.shape[3:]:
        raise ValueError(
            f"packed: got shape {tuple(packed.shape)}, expected (B, N, 3, heads, head_dim) or (B, N, 2, heads, head_dim)"
            " with heads and head_dim at least 1"
        )
    checks.tensor("bias", bias, (packed.shape[2:].numel(),), packed)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(packed: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        *dq, dk, dv = gradients
        return SPLIT_QKV_BACKWARD.call(dq[0] if dq else None, dk, dv, ctx.dtype)  # type: ignore[no-any-return]


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(packed: Tensor, bias: Tensor) -> Tensor:
        return packed.view_as(packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor) -> tuple[Tensor, Tensor]:
        return dpacked, dpacked.sum((0, 1), dtype=accumulator(dpacked)).flatten().to(ctx.dtype)


# ------------------------------------------------------------------------------------------------------------------
# Declaration
# ------------------------------------------------------------------------------------------------------------------


def _check(dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> None:
    checks.tensor("dk", dk, (None, None, None, None), dk)
    if 0 in dk.shape[2:]:
        raise ValueError(f"dk: got shape {tuple(dk.shape)}; heads and head_dim must be at least 1")
    checks.dtype("dtype", dtype)
    for name, value in (("dq", dq), ("dv", dv)):
        checks.optional(name, value, tuple(dk.shape), dk)
        if value is not None and value.dtype != dk.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}, but dk is {dk.dtype}")


def parts_of(dq: Tensor | None, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    """What is there, in the order of packing."""
    return (dk, dv) if dq is None else (dq, dk, dv)


def _fake(dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (batch, length, heads, head_dim), parts = dk.shape, len(parts_of(dq, dk, dv))
    dpacked = dk.new_empty((batch, length, parts, heads, head_dim))
    return dpacked, dk.new_empty((parts * heads * head_dim,), dtype=dtype)


SPLIT_QKV_BACKWARD = registry.declare(
    "split_qkv_backward",
    "(Tensor? dq, Tensor dk, Tensor dv, ScalarType dtype) -> (Tensor dpacked, Tensor dbias)",
    check=_check,
    fake=_fake,
)
registry.refuse_double_backward(SPLIT_QKV_BACKWARD)


# ------------------------------------------------------------------------------------------------------------------
# The torch backend: the formulas at the top of this file
# ------------------------------------------------------------------------------------------------------------------


def _torch_split_qkv_backward(
    dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dpacked = torch.stack(parts_of(dq, dk, dv), 2).contiguous()
    return dpacked, dpacked.sum((0, 1), dtype=accumulator(dpacked)).flatten().to(dtype)


registry.implement(SPLIT_QKV_BACKWARD, "torch", _torch_split_qkv_backward)
