"""What torch has in force around a call: a compiler, modes, functorch transforms, forward-mode AD, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.masked import MaskedTensor
from torch.utils._python_dispatch import TorchDispatchMode

_Function = TypeVar("_Function", bound=Callable[..., Any])

# ---- Tools of torch that look at calls -------------------------------------------------------------------------------

_functorch = torch._C._functorch
# Bound once: each is asked at every call.
profiler_enabled = torch.autograd._profiler_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_in_function_mode = torch._C._is_torch_function_mode_enabled
_transform = torch._C._functorch.peek_interpreter_stack
PLAIN = (Tensor, torch.nn.Parameter)


def refuse_forward_ad(name: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError if a tensor carries a forward-mode tangent, which a custom op would silently drop.

    While Dynamo traces, tangents cannot be seen: it refuses wherever forward mode is on. Dynamo guards on the level, so that a
    compiled function asks again where it is called in forward mode.
    """
    if forward_ad._current_level < 0:
        return
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(no_forward_mode(name))
    inside_jvp = any(interpreter.key() == _functorch.TransformType.Jvp for interpreter in _functorch.get_interpreter_stack() or ())
    if inside_jvp:
        raise NotImplementedError(no_forward_mode(name))
    refuse_tangents(name, [t for t in tensors if t is not None])


def refuse_tangents(name: str, tensors: Sequence[Tensor]) -> None:
    """As ``refuse_forward_ad``, where forward mode is known to be on."""
    # Where Dynamo has fallen back to eager for a caller, it starts again with this frame, and cannot see tangents here either.
    if torch.compiler.is_dynamo_compiling() or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(no_forward_mode(name))


def no_forward_mode(name: str) -> str:
    """The message of that error."""
    return f"{name}: forward-mode differentiation is not supported; use ditkernels.reference.{name}"


def refuse_kinds(name: str, *tensors: Tensor | None) -> None:
    """Raises TypeError, naming the kind, on what no op takes: nested tensors, MaskedTensor, proxies of torch.fx.symbolic_trace."""
    for tensor in tensors:
        kind = None if tensor is None else _refused_kind(tensor)
        if kind is not None:
            raise TypeError(f"{name}: got {kind}")


def _refused_kind(tensor: Tensor) -> str | None:
    if isinstance(tensor, torch.fx.Proxy):
        return "a proxy of torch.fx.symbolic_trace, which is not supported; torch.export and make_fx trace the same code"
    if isinstance(tensor, MaskedTensor):
        return "a MaskedTensor, allowed are tensors without a mask"
    if tensor.is_nested:
        return f"a nested tensor ({tensor.layout}), allowed are dense tensors"
    return None


def watched_by_torch() -> bool:
    """Whether a tool of torch looks at calls: a mode, a functorch transform, forward-mode AD."""
    return forward_ad._current_level >= 0 or _dispatch_modes() > 0 or _in_function_mode() or _transform() is not None


def certainly(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; of sizes that a compiler cannot know the answer is no."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def constant_when_traced(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import all of Dynamo, a second's work, on ``import ditkernels``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def exporting() -> bool:
    """Whether torch.export traces."""
    # Not is_exporting(), which Dynamo of torch 2.11 takes for True always.
    return torch.compiler._is_exporting_flag


@constant_when_traced  # Dynamo would take torch's answer for False
def _for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export traces, whose graph may hold no op of ours."""
    return exporting() and _for_onnx()


def compiled_alone() -> bool:
    """Whether Dynamo traces for torch.compile, and not for torch.export, whose graph may run on another device."""
    return torch.compiler.is_dynamo_compiling() and not exporting()


class WholeWay(TorchDispatchMode):
    """A mode that changes nothing: calls inside it take the whole way, and so run the kernels of every backend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def is_plain(tensor: Tensor) -> bool:
    """Whether the thin way may take the tensor: it is of no subclass and holds data."""
    return type(tensor) in PLAIN and not tensor.is_meta


# ---- Autocast --------------------------------------------------------------------------------------------------------


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast would compute in on the tensor's device, or None where it is off or, as for fp64, leaves the tensor be."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = "cpu" if tensor.is_cpu else tensor.device.type
    if device == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from touching products of a kernel, whose dtypes are settled."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
