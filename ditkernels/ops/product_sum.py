"""value · factor + addend in one pass, with the bits of plain PyTorch's two or three operations.

It is no op of autograd and has no reference of its own: ``accelerate(..., exact=True)`` runs it where no gradient is wanted.
The product is rounded to ``product``, the dtype that PyTorch gives it, the sum to ``total`` and then to the result's dtype.
Kernels: csrc/cpu/sum.cpp and product_sum_triton.py, neither of which contracts the two into one rounding.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _native
from ditkernels.ops.settings import backend_setting

_TRITON = f"{__name__}_triton"


def server(device: torch.device) -> str | None:
    """The backend whose kernel runs on tensors of a device, "cpu" or "triton", in line with a forced one; None if there is none."""
    forced = backend_setting()
    if forced in (None, "cpu") and _native.cpu_reason(device) is None:
        return "cpu"
    if forced not in (None, "triton") or (device.type == "cpu" and forced is None):
        return None
    return "triton" if importlib.import_module(_TRITON).reason(device) is None else None


def product_sum(
    value: Tensor, factor: Tensor, addend: Tensor, product: torch.dtype, total: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """value · factor + addend, without gradients.

    Args:
        value: (B, N, D), any strides.
        factor, addend: each (B, N, D), or one that broadcasts to it: (B, 1, D), (1, 1, D) or (D,).
        product, total, out_dtype: what the product, the sum and the result are rounded to, in this order.

    Dtypes: fp32, bf16, fp16, each tensor its own.

    Returns:
        (B, N, D) in ``out_dtype``.

    Raises:
        RuntimeError: no kernel serves the device, or a shape does not broadcast.
    """
    found = server(value.device)
    if found is None:
        raise RuntimeError(f"product_sum: no kernel serves {value.device} with the backend {backend_setting() or 'auto'}")
    factor, addend = factor.expand_as(value), addend.expand_as(value)
    if found == "cpu":
        made: Tensor = torch.ops.ditkernels.product_sum_cpu(value, factor, addend, product, total, out_dtype)
        return made
    kernel: Any = importlib.import_module(_TRITON)
    return kernel.product_sum(value, factor, addend, product, total, out_dtype)  # type: ignore[no-any-return]
