"""The CUDA C++ backend of ``split_qkv``'s backward: when the kernels of csrc/qkv.cu can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops import _cuda
from ditkernels.ops import _registry as registry
from ditkernels.ops.qkv import SPLIT_QKV_BACKWARD


# No block holds a whole row, so that a row may be of any width.
def _refuse(dq: Tensor | None, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> str | None:
    return _cuda.refuse("split_qkv_backward", 1, dk, dtype)


registry.implement_elsewhere(SPLIT_QKV_BACKWARD, "cuda", refuse=_refuse, not_automatic=_cuda.NOT_MEASURED)
