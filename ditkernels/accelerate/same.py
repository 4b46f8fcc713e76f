"""Which modules are equal as far as a proof can tell: the same classes, the same attributes, parameters of the same shapes."""

from __future__ import annotations

import hashlib
import io
import pickle
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ditkernels.accelerate.proof import is_ordinary

_BY_IDENTITY = (type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device, torch._ops.OpOverload)


def description(subject: Any) -> Any:
    """Equal for two modules only if a proof of one holds for the other; what cannot be described equals nothing.

    Parameters count by their shapes, as a proof draws their values; buffers count by their values.
    """
    written = io.BytesIO()
    try:
        _Description(written).dump(subject)
    # What pickle and an object's own ``__reduce__`` raise where there is nothing to write.
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError):
        return object()
    return hashlib.sha256(written.getvalue()).digest()


class _Description(pickle.Pickler):
    """As pickle writes an object, but for tensors and for what has a name: classes need not be found in a module again."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), str(value.dtype), str(value.device), _contents(value)
        return ("object", id(value)) if isinstance(value, _BY_IDENTITY) else None


def _contents(tensor: Tensor) -> Any:
    if isinstance(tensor, nn.Parameter) and is_ordinary(tensor):
        return "drawn"
    if type(tensor.data) is not Tensor or tensor.is_meta:
        return id(tensor)
    plain = tensor.detach().to("cpu").reshape(-1).contiguous()
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).digest()
