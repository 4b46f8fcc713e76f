"""The CUDA C++ backend of ``adamw_ema``: when the kernels of csrc/adamw_ema.cu can serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditkernels.ops import _cuda
from ditkernels.ops import _registry as registry
from ditkernels.ops.adamw_ema import ADAMW_EMA, not_contiguous


def _refuse(weights: list[Tensor], *rest: Any) -> str | None:
    return _cuda.refuse("adamw_ema", 1, weights[0]) or not_contiguous(weights, *rest)


registry.implement_elsewhere(ADAMW_EMA, "cuda", refuse=_refuse, not_automatic=_cuda.NOT_MEASURED)
