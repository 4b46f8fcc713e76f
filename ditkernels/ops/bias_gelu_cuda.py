"""The CUDA C++ backend of ``bias_gelu``: when the kernels of csrc/bias_gelu.cu can serve."""

from __future__ import annotations

from torch import Tensor

from ditkernels.ops import _cuda
from ditkernels.ops import _registry as registry
from ditkernels.ops.bias_gelu import BIAS_GELU, BIAS_GELU_BACKWARD


# No block holds a whole row, so that a row may be of any width.
def _refuse(x: Tensor, bias: Tensor | None) -> str | None:
    return _cuda.refuse("bias_gelu", 1, x, bias)


def _refuse_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> str | None:
    return _cuda.refuse("bias_gelu_backward", 1, x, dy, bias)


for _op, _reason in ((BIAS_GELU, _refuse), (BIAS_GELU_BACKWARD, _refuse_backward)):
    registry.implement_elsewhere(_op, "cuda", refuse=_reason, not_automatic=_cuda.NOT_MEASURED)
