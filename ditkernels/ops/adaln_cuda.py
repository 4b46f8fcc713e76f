"""The CUDA C++ backend of ``adaln``: when the kernels of csrc/adaln.cu can serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditkernels.ops import _cuda, adaln
from ditkernels.ops import _registry as registry


def _refuse_modulate_norm(x: Tensor, *rest: Any) -> str | None:
    *vectors, _, _, out_dtype = rest
    return _cuda.refuse("modulate_norm", x.shape[-1], x, *vectors, out_dtype)


def _refuse_modulate_norm_backward(dy: Tensor, x: Tensor, *rest: Any) -> str | None:
    return _cuda.refuse("modulate_norm_backward", x.shape[-1], x, dy, *rest[:-1])


def _refuse_gated_residual(x: Tensor, *rest: Tensor | None) -> str | None:
    return _cuda.refuse("gated_residual", x.shape[-1], x, *rest)


def _refuse_gated_residual_backward(dy: Tensor, *rest: Tensor | None) -> str | None:
    return _cuda.refuse("gated_residual_backward", dy.shape[-1], dy, *rest)


def _refuse_gated_residual_norm(x: Tensor, branch: Tensor, *rest: Any) -> str | None:
    *vectors, _, _, out_dtype = rest
    return _cuda.refuse("gated_residual_norm", x.shape[-1], x, branch, *vectors, out_dtype)


def _refuse_gated_residual_norm_backward(
    dx1: Tensor | None, dh: Tensor, x1: Tensor, branch: Tensor, *rest: Any
) -> str | None:
    return _cuda.refuse("gated_residual_norm_backward", x1.shape[-1], x1, dx1, dh, branch, *rest[:-1])


for _op, _refuse in (
    (adaln.MODULATE_NORM, _refuse_modulate_norm),
    (adaln.MODULATE_NORM_BACKWARD, _refuse_modulate_norm_backward),
    (adaln.GATED_RESIDUAL, _refuse_gated_residual),
    (adaln.GATED_RESIDUAL_BACKWARD, _refuse_gated_residual_backward),
    (adaln.GATED_RESIDUAL_NORM, _refuse_gated_residual_norm),
    (adaln.GATED_RESIDUAL_NORM_BACKWARD, _refuse_gated_residual_norm_backward),
):
    registry.implement_elsewhere(_op, "cuda", refuse=_refuse, not_automatic=_cuda.NOT_MEASURED)
