"""The CUDA C++ backend of ``mlp``: GELU as an epilogue of cuBLASLt's products (csrc/mlp.cu), and when it can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops import _cuda, _measured
from ditkernels.ops import _registry as registry
from ditkernels.ops.mlp import implement

# The library supplies the kernels. z, the argument of GELU, is nobody's, (0,), where it need not be kept.
registry.define("linear_gelu_cuda(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor h, Tensor z)")
registry.define(
    "gelu_linear_backward_cuda(Tensor dy, Tensor weight, Tensor z, bool biased) -> (Tensor dz, Tensor dbias)"
)
registry.define("cuda_blas() -> str")

DTYPES = (torch.bfloat16, torch.float16)
ALIGNED = 8


def _hidden(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    packed = None if bias is None else bias.contiguous()
    h, z = torch.ops.ditkernels.linear_gelu_cuda(x, weight.contiguous(), packed, keep)
    return z, h


def _hidden_backward(dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.ditkernels.gelu_linear_backward_cuda(dy, weight.contiguous(), z, bias is not None)


def reason(device: torch.device, dtype: torch.dtype, width: int, hidden: int, out: int) -> str | None:
    """Why the epilogues cannot serve on a device, for x (B, N, width) and weights (hidden, width) and (out, hidden), or None."""
    missing = _cuda.device_reason("linear_gelu", device)
    if missing is not None:
        return missing
    if dtype not in DTYPES:
        return f"{dtype} is not among the products' dtypes ({', '.join(map(str, DTYPES))})"
    for name, size in (("D", width), ("F", hidden), ("E", out)):
        if size % ALIGNED:
            return f"{name} is {size}; the products need a multiple of {ALIGNED}"
    return torch.ops.ditkernels.cuda_blas() or None


def _refuse(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, *_: object
) -> str | None:
    return reason(x.device, x.dtype, x.shape[2], *fc2_weight.shape[::-1])


@registry.constant_when_traced
def serves(device: torch.device, dtype: torch.dtype, width: int, hidden: int, out: int) -> bool:
    """Whether a call of ``mlp`` with such tensors would run on the epilogues: they can, and are asked for or were measured fastest.

    Otherwise its parts one by one do the same, and leave a compiler more to choose.
    """
    asked = registry.backend_setting() or _measured.fastest("mlp", device)
    return asked == "cuda" and reason(device, dtype, width, hidden, out) is None


implement("cuda", _hidden, _hidden_backward, refuse=_refuse, not_automatic=_cuda.NOT_MEASURED)
