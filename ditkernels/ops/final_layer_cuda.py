"""The CUDA C++ backend of ``final_layer`` and ``unpatchify``: when the kernels of csrc/final_layer*.cu can serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _cuda
from ditkernels.ops import _registry as registry
from ditkernels.ops.final_layer import (
    FINAL_LAYER,
    FINAL_LAYER_BACKWARD,
    UNPATCHIFY,
    UNPATCHIFY_BACKWARD,
)

MAX_WIDTH = 20_320
"""What fits of a row, beside the sums, in the 96 KiB of shared memory that every device has."""


def _refuse(op: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    given = [a for a in args if isinstance(a, (Tensor, torch.dtype))]
    reason = _cuda.refuse(op, 1, x, weight, *given)
    if reason is None and x.shape[-1] > MAX_WIDTH:
        return (
            f"a row of {x.shape[-1]} channels does not fit in shared memory; the widest taken is {MAX_WIDTH}"
        )
    if reason is None and weight.shape[0] == 0:
        return "the linear has no outputs"
    return reason


def _refuse_final_layer(*args: Any) -> str | None:
    return _refuse("final_layer", args[0], args[8], *args)


def _refuse_final_layer_backward(*args: Any) -> str | None:
    return _refuse("final_layer_backward", args[2], args[10], *args)


def _refuse_unpatchify(tokens: Tensor, *args: Any) -> str | None:
    return _cuda.refuse("unpatchify", 1, tokens)


def _refuse_unpatchify_backward(dout: Tensor, *args: Any) -> str | None:
    return _cuda.refuse("unpatchify_backward", 1, dout)


for _op, _reason in (
    (FINAL_LAYER, _refuse_final_layer),
    (FINAL_LAYER_BACKWARD, _refuse_final_layer_backward),
    (UNPATCHIFY, _refuse_unpatchify),
    (UNPATCHIFY_BACKWARD, _refuse_unpatchify_backward),
):
    registry.implement_elsewhere(_op, "cuda", refuse=_reason, not_automatic=_cuda.NOT_MEASURED)
