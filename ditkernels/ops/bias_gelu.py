"""The hidden layer of an MLP: ``bias_gelu``, the bias a linear left behind and tanh-GELU, with the bias' gradient in the backward.

With z = x + bias, where x = W·h comes from a linear without its bias, all in fp32 (fp64 for fp64):

    u(z) = √(2/π)·(z + κ·z³), κ = 0.044715        σ = 1 / (1 + e^(−2u)) = (1 + tanh u) / 2
    y    = z·σ

Backward, from dy:

    dx = dy·(σ + z·σ'·2u'(z))        u'(z) = √(2/π)·(1 + 3κ·z²)        σ' = σ·(1 − σ)
    dbias = Σ_bn dx

σ' is the product of σ at 2u and at −2u, since 1 − σ would cancel where z·u' is large.

Saved for backward: x, which the linear has just written, and the bias. So forward reads x and writes y, backward reads dy and x and
writes dx, and the bias' gradient costs no pass of its own over dx. The products before and after stay torch's.

GELU: Hendrycks & Gimpel, arXiv 1606.08415; this is its tanh form, as in DiT.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _checks as checks
from ditkernels.ops import _registry as registry
from ditkernels.ops.adaln import accumulator, empty_like_or_none, present

ROOT = math.sqrt(2 / math.pi)
KAPPA = 0.044715

# ------------------------------------------------------------------------------------------------------------------
# Public function
# ------------------------------------------------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """tanh-GELU of x + bias, in x's dtype; ``bias`` is that of the linear that made x and left it to this op.

    >>> h = bias_gelu(F.linear(h, fc1.weight), fc1.bias)

    Args:
        x: (B, N, D), any strides.
        bias: (D,), optional.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own; arithmetic is in fp32.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    registry.refuse_forward_ad("bias_gelu", x, bias)
    return torch.ops.ditkernels.bias_gelu(x, bias)


# ------------------------------------------------------------------------------------------------------------------
# Declarations
# ------------------------------------------------------------------------------------------------------------------


def _check(x: Tensor, bias: Tensor | None) -> None:
    _, _, width = checks.tokens("x", x)
    checks.optional("bias", bias, (width,), x)


def _check_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> None:
    _check(x, bias)
    checks.tensor("dy", dy, tuple(x.shape), x)


def _fake(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fake(x, bias), empty_like_or_none(bias, x)


BIAS_GELU = registry.declare("bias_gelu", "(Tensor x, Tensor? bias) -> Tensor", check=_check, fake=_fake)
BIAS_GELU_BACKWARD = registry.declare(
    "bias_gelu_backward",
    "(Tensor dy, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)",
    check=_check_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = BIAS_GELU_BACKWARD.call(dy, x, bias)
    return dx, present(dbias, bias)


registry.differentiate(BIAS_GELU, _setup, _backward)
registry.refuse_double_backward(BIAS_GELU_BACKWARD)


# ------------------------------------------------------------------------------------------------------------------
# The torch backend: the formulas at the top of this file
# ------------------------------------------------------------------------------------------------------------------


def _biased(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """z and 2u(z) in the accumulation dtype."""
    z = x.to(accumulator(x))
    if bias is not None:
        z = z + bias.to(z.dtype)
    return z, 2 * ROOT * z * (1 + KAPPA * z**2)


def _torch_bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    z, steep = _biased(x, bias)
    return (z * torch.sigmoid(steep)).to(x.dtype).contiguous()


def _torch_bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    z, steep = _biased(x, bias)
    sigma = torch.sigmoid(steep)
    slope = sigma + z * sigma * torch.sigmoid(-steep) * 2 * ROOT * (1 + 3 * KAPPA * z**2)
    dx = dy.to(z.dtype) * slope
    dbias = x.new_empty(0) if bias is None else dx.sum((0, 1)).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dbias


registry.implement(BIAS_GELU, "torch", _torch_bias_gelu)
registry.implement(BIAS_GELU_BACKWARD, "torch", _torch_bias_gelu_backward)
