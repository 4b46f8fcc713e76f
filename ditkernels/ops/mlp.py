"""A transformer's MLP as one op: ``mlp``, two products with tanh-GELU between them, so that GELU can go along with the products.

With x (B, N, D), W₁ (F, D), b₁ (F,), W₂ (E, F), and GELU as in bias_gelu.py:

    z = x·W₁ᵀ + b₁        h = GELU(z)        y = h·W₂ᵀ

The bias of the second linear is left to the kernel that adds y to the residual stream. Backward, from dy:

    dz = (dy·W₂) ⊙ GELU'(z)        db₁ = Σ_bn dz        dW₂ = dyᵀ·h        dW₁ = dzᵀ·x        dx = dz·W₁

Saved for backward: x, z and h, the weights. z is kept in x's dtype; GELU' is taken of what was kept.

Why one op: what GELU moves is (B, N, F), four times a branch's width. On its own it reads z and writes h, and backward reads dh and
z and writes dz: five passes. As an epilogue of the products beside it (``cuda``: cuBLASLt, csrc/mlp.cu) it writes z forward and
reads z backward: two, since h and dz are what the products write, and dh never exists. There h is the GELU of z before z is
rounded. The other backends take the product, then the kernel of ``bias_gelu``.

GELU: Hendrycks & Gimpel, arXiv 1606.08415; this is its tanh form, as in DiT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkernels.ops import _checks as checks
from ditkernels.ops import _registry as registry
from ditkernels.ops import bias_gelu_triton  # noqa: F401 (it registers a backend)
from ditkernels.ops.adaln import empty_like_or_none
from ditkernels.ops.bias_gelu import BIAS_GELU, BIAS_GELU_BACKWARD

# ------------------------------------------------------------------------------------------------------------------
# Public function
# ------------------------------------------------------------------------------------------------------------------


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor) -> Tensor:
    """fc2(GELU(fc1(x))) without the bias of fc2.

    >>> branch = mlp(h, fc1.weight, fc1.bias, fc2.weight)
    >>> x = gated_residual(x, branch, gate, branch_bias=fc2.bias)

    Args:
        x: (B, N, D), any strides.
        fc1_weight: (F, D).
        fc1_bias: (F,), optional.
        fc2_weight: (E, F).

    Dtypes: all of one, fp32, bf16 or fp16 (fp64 on the ``torch`` backend); under autocast each is taken in autocast's dtype, as by
    the linears. Products add up in fp32.

    Returns:
        (B, N, E) in that dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    registry.refuse_forward_ad("mlp", x, fc1_weight, fc1_bias, fc2_weight)
    dtype = registry.autocast_dtype(x)
    if dtype is not None:
        x, fc1_weight, fc2_weight = x.to(dtype), fc1_weight.to(dtype), fc2_weight.to(dtype)
        fc1_bias = None if fc1_bias is None else fc1_bias.to(dtype)
    needed = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, fc1_weight, fc1_bias, fc2_weight)
    )
    y, _, _ = torch.ops.ditkernels.mlp(x, fc1_weight, fc1_bias, fc2_weight, needed)
    return y


# ------------------------------------------------------------------------------------------------------------------
# Declarations
# ------------------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, keep: bool = True
) -> None:
    _, _, width = checks.tokens("x", x)
    checks.tensor("fc1_weight", fc1_weight, (None, width), x)
    hidden = fc1_weight.shape[0]
    checks.optional("fc1_bias", fc1_bias, (hidden,), x)
    checks.tensor("fc2_weight", fc2_weight, (None, hidden), x)
    for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        if weight.shape[0] < 1:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}; the first axis must not be empty")
    for name, value in (("fc1_weight", fc1_weight), ("fc1_bias", fc1_bias), ("fc2_weight", fc2_weight)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}, expected x's, {x.dtype}")


def _check_backward(
    dy: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    z: Tensor,
    h: Tensor,
    needs: list[bool],
) -> None:
    _check(x, fc1_weight, fc1_bias, fc2_weight)
    batch, length, _ = x.shape
    checks.tensor("dy", dy, (batch, length, fc2_weight.shape[0]), x)
    for name, value in (("z", z), ("h", h)):
        checks.tensor(name, value, (batch, length, fc1_weight.shape[0]), x)
    if len(needs) != 4:
        raise ValueError(f"needs: got {len(needs)} answers, expected 4, one for each input")


def _fake(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:2]
    kept = (*rows, fc1_weight.shape[0]) if keep else (0,)
    return x.new_empty((*rows, fc2_weight.shape[0])), x.new_empty(kept), x.new_empty(kept)


def _fake_backward(dy, x, fc1_weight, fc1_bias, fc2_weight, z, h, needs):  # type: ignore[no-untyped-def]
    inputs = (x, fc1_weight, fc1_bias, fc2_weight)
    return tuple(empty_like_or_none(t if needed else None, x) for t, needed in zip(inputs, needs))


MLP = registry.declare(
    "mlp",
    "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, bool keep) -> (Tensor y, Tensor z, Tensor h)",
    check=_check,
    fake=_fake,
)
MLP_BACKWARD = registry.declare(
    "mlp_backward",
    "(Tensor dy, Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor z, Tensor h, bool[] needs)"
    " -> (Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight)",
    check=_check_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, z, h = output
    ctx.mark_non_differentiable(z, h)
    # Or autograd would fill two tensors as large as z and h with zeros, for gradients that nobody has.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], z, h)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:  # from a function that has no gradient for y
        return (None,) * 5
    x, fc1_weight, fc1_bias, fc2_weight, z, h = ctx.saved_tensors
    needs = [
        needed and t is not None
        for needed, t in zip(ctx.needs_input_grad, (x, fc1_weight, fc1_bias, fc2_weight))
    ]
    grads = MLP_BACKWARD.call(dy, x, fc1_weight, fc1_bias, fc2_weight, z, h, needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs)), None)


registry.differentiate(MLP, _setup, _backward)
registry.refuse_double_backward(MLP_BACKWARD)


def _flops(
    x: torch.Size, fc1_weight: torch.Size, fc1_bias: Any, fc2_weight: torch.Size, *_: Any, **options: Any
) -> int:
    batch, length, width = x
    out, hidden = fc2_weight
    return 2 * batch * length * hidden * (width + out)


def _flops_backward(
    dy: torch.Size,
    x: torch.Size,
    fc1_weight: torch.Size,
    fc1_bias: torch.Size | None,
    fc2_weight: torch.Size,
    z: torch.Size,
    h: torch.Size,
    needs: list[bool],
    **options: Any,
) -> int:
    batch, length, width = x
    out, hidden = fc2_weight
    return 2 * batch * length * hidden * (out * (1 + needs[3]) + width * (needs[0] + needs[1]))


registry.register_flops(MLP, _flops)
registry.register_flops(MLP_BACKWARD, _flops_backward)


# ------------------------------------------------------------------------------------------------------------------
# The op from what a backend makes of its two halves
# ------------------------------------------------------------------------------------------------------------------

# (x (M, D), fc1_weight, fc1_bias, keep) -> z, h of (M, F); z may be (0,) where it need not be kept.
Hidden = Callable[[Tensor, Tensor, "Tensor | None", bool], tuple[Tensor, Tensor]]
# (dy (M, E), fc2_weight, z, fc1_bias) -> dz (M, F), dfc1_bias
HiddenBackward = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


def rows(tensor: Tensor) -> Tensor:
    """(B, N, D) as (B·N, D), packed."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def implement(
    backend: str,
    hidden: Hidden,
    hidden_backward: HiddenBackward,
    *,
    refuse: registry.Refusal,
    not_automatic: str | None = None,
) -> None:
    """Gives the op to a backend that has its two halves; the products beside them are torch's."""

    def forward(
        x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, h = hidden(rows(x), fc1_weight, fc1_bias, keep)
        shape = x.shape[:2]
        y = F.linear(h, fc2_weight).unflatten(0, shape)
        if not keep:
            return y, x.new_empty(0), x.new_empty(0)
        return y, z.unflatten(0, shape), h.unflatten(0, shape)

    def backward(
        dy: Tensor,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        z: Tensor,
        h: Tensor,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_x, of_weight1, of_bias1, of_weight2 = needs
        nothing = x.new_empty(0)
        flat = rows(dy.to(x.dtype))
        dz, dbias1 = hidden_backward(flat, fc2_weight, rows(z), fc1_bias if of_bias1 else None)
        dx = (dz @ fc1_weight).unflatten(0, x.shape[:2]) if of_x else nothing
        dweight1 = dz.t() @ rows(x) if of_weight1 else nothing
        dweight2 = flat.t() @ rows(h) if of_weight2 else nothing
        return dx, dweight1, dbias1, dweight2

    def refuse_backward(dy: Tensor, x: Tensor, *others: Any) -> str | None:
        return refuse(x, *others)

    registry.implement(MLP, backend, forward, refuse=refuse, not_automatic=not_automatic)
    registry.implement(MLP_BACKWARD, backend, backward, refuse=refuse_backward, not_automatic=not_automatic)


def _through_bias_gelu(backend: str) -> None:
    """A product that adds the bias, then the kernel of ``bias_gelu``; backward a bias of zeros has the kernel add up dz."""
    gelu, gelu_backward = (op.implementations[backend] for op in (BIAS_GELU, BIAS_GELU_BACKWARD))

    def hidden(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        z = F.linear(x, weight, bias)
        return z, gelu.call(z[None], None)[0]

    def hidden_backward(dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        zeros = None if bias is None else torch.zeros_like(bias)
        dz, dbias = gelu_backward.call((dy @ weight)[None], z[None], zeros)
        return dz[0], dbias

    implement(backend, hidden, hidden_backward, refuse=lambda x, weight1, bias1, *_: gelu.refuse(x, bias1))


for _backend in ("torch", "triton"):
    _through_bias_gelu(_backend)
