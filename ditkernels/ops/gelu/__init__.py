"""The hidden layer of an MLP: ``bias_gelu``, the bias a linear left behind and tanh-GELU, with the bias' gradient in the backward.

With z = x + bias, where x = W·h comes from a linear without its bias, in compiled kernels all in fp32:

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

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import _native
from ditkernels.ops.dispatch import declare
from ditkernels.ops.spec import Example, Gradient, Wanted, accumulator

__all__ = ["bias_gelu"]

ROOT = math.sqrt(2 / math.pi)
KAPPA = 0.044715

# ---- Public function and declaration ---------------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """tanh-GELU of x + bias, in x's dtype; ``bias`` is that of the linear that made x and left it to this op.

    >>> h = bias_gelu(F.linear(h, fc1.weight), fc1.bias)

    Args:
        x: (B, N, D), any strides.
        bias: (D,), optional.

    Dtypes: fp32, bf16, fp16 (fp64 on the ``torch`` backend), each tensor its own. Compiled kernels compute in fp32;
    the ``torch`` backend rounds where plain PyTorch does.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or kind of tensor that does not fit, named.
        BackendError: the forced backend cannot serve.
        NotImplementedError: forward-mode differentiation.
    """
    return BIAS_GELU((x, bias))  # type: ignore[no-any-return]


BIAS_GELU = declare(
    "bias_gelu",
    inputs="x: BND, bias: D?",
    outputs="y: BND = x",
    shards="BND",
    meaning=reference.bias_gelu,
    gradient=Gradient(reads="x bias", needs={"x bias": "x bias"}),
    examples=(Example({"B": 3, "N": 7, "D": 45}), Example({"B": 3, "N": 37, "D": 384}, present="")),
)


# ---- The formulas at the top of this file: gradcheck runs on them, and no backend is made of them --------------------


def _biased(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """z and 2u(z) in the accumulation dtype."""
    z = x.to(accumulator(x))
    if bias is not None:
        z = z + bias.to(z.dtype)
    return z, 2 * ROOT * z * (1 + KAPPA * z**2)


def formula(x: Tensor, bias: Tensor | None) -> Tensor:
    """y in x's dtype."""
    z, double_u = _biased(x, bias)
    return (z * torch.sigmoid(double_u)).to(x.dtype).contiguous()


def gradients_formula(dy: Tensor, x: Tensor, bias: Tensor | None, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """dx and dbias, as far as they are wanted."""
    of_x, of_bias = wanted
    z, double_u = _biased(x, bias)
    sigma = torch.sigmoid(double_u)
    derivative = sigma + z * sigma * torch.sigmoid(-double_u) * 2 * ROOT * (1 + 3 * KAPPA * z**2)
    dx = dy.to(z.dtype) * derivative
    dbias = dx.sum((0, 1)).to(of_bias) if of_bias else None
    return dx.to(of_x).contiguous() if of_x else None, dbias


# ---- The torch backend: torch's own GELU, in the memory of z where that is not x's -----------------------------------


@BIAS_GELU.implement("torch", plain=reference.bias_gelu)
def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """y in x's dtype."""
    y = F.gelu(x, approximate="tanh") if bias is None else torch.ops.aten.gelu_(x + bias, approximate="tanh")
    return y.to(x.dtype).contiguous()


@BIAS_GELU.gradients.implement("torch")
def backward(dy: Tensor, x: Tensor, bias: Tensor | None, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """dx and dbias, as far as they are wanted."""
    of_x, of_bias = wanted
    z = x if bias is None else x + bias
    dy = dy.to(z.dtype)
    if bias is None:
        dx = torch.ops.aten.gelu_backward(dy, z, approximate="tanh")
    else:
        dx = torch.ops.aten.gelu_backward.grad_input(dy, z, approximate="tanh", grad_input=z)
    dbias = dx.sum((0, 1)).to(of_bias) if of_bias else None
    return dx.to(of_x).contiguous() if of_x else None, dbias


for _op in (BIAS_GELU, BIAS_GELU.gradients):
    _op.implement_elsewhere("cuda", refuse=_native.refuse_cuda)
    _op.implement_elsewhere("cpu", refuse=_native.refuse_cpu)
    _op.implement_later("triton", f"{__name__}.triton")
