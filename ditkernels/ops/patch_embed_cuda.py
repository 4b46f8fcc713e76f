"""The CUDA C++ backend of ``patch_embed``: when the kernels of csrc/patch_embed.cu can serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _cuda
from ditkernels.ops import _registry as registry
from ditkernels.ops.patch_embed import PATCH_EMBED, PATCH_EMBED_BACKWARD


def _refuse(op: str, weight: Tensor, *args: Any) -> str | None:
    if weight.numel() == 0:
        return "the weight is empty"
    given = [a for a in args if isinstance(a, (Tensor, torch.dtype))]
    return _cuda.refuse(op, 1, weight, *given)


def _refuse_patch_embed(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _refuse("patch_embed", weight, x, *args)


def _refuse_patch_embed_backward(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _refuse("patch_embed_backward", weight, dy, x, *args)


for _op, _reason in (
    (PATCH_EMBED, _refuse_patch_embed),
    (PATCH_EMBED_BACKWARD, _refuse_patch_embed_backward),
):
    registry.implement_elsewhere(_op, "cuda", refuse=_reason, not_automatic=_cuda.NOT_MEASURED)
