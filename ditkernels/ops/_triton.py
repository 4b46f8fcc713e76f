"""What the Triton kernels of all ops share: when they can serve, how a row is cut into tiles, how they are launched.

Importing this file never compiles and never initialises CUDA; where Triton is missing it leaves a reason, not an ImportError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = tl = None
    MISSING: str | None = f"triton cannot be imported: {error}"
else:
    MISSING = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384  # rows wider than 4096 are right, but the backward spills
OLDEST_CAPABILITY = (8, 0)


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, or the function as it is where Triton is missing (it is then never called)."""
    return function if triton is None else triton.jit(function)


@jit
def _probe():  # type: ignore[no-untyped-def]
    pass


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when this file was imported."""


def _mend_interpreter() -> None:
    """Lets loops run to a bound that is an argument: Triton 3.6's interpreter makes it an index in a way NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _mend_interpreter()

# ------------------------------------------------------------------------------------------------------------------
# When the kernels can serve
# ------------------------------------------------------------------------------------------------------------------


@functools.cache
def _capability_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    got, need = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"the device has compute capability {got}, the kernels need {need}"


def device_reason(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of ``device``, or None if they can."""
    if MISSING is not None:
        return MISSING
    if device.type == "cuda":
        return None if INTERPRETED else _capability_reason(device)
    if device.type == "cpu" and INTERPRETED:
        return None
    hint = "; TRITON_INTERPRET=1 runs them on the CPU, for tests" if device.type == "cpu" else ""
    return f"the tensors are on {device.type}, the kernels need CUDA{hint}"


def refuse(width: int, first: Tensor, *others: Tensor | torch.dtype | None) -> str | None:
    """Why the kernels cannot take a row of ``width`` channels of these tensors (or these dtypes), or None if they can."""
    reason = device_reason(first.device)
    if reason is not None:
        return reason
    for value in (first, *others):
        dtype = value.dtype if isinstance(value, Tensor) else value
        if dtype is not None and dtype not in DTYPES:
            return f"{dtype} is not among the kernels' dtypes ({', '.join(map(str, DTYPES))})"
    if width > MAX_WIDTH:
        return f"a row of {width} channels does not fit in registers; the widest taken is {MAX_WIDTH}"
    return None


# ------------------------------------------------------------------------------------------------------------------
# How a row is cut
# ------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How one program works: rows held at a time, warps, pipeline stages, registers a thread may hold.

    Without that number ptxas chooses it, by how many programs it would like on a multiprocessor.
    """

    rows: int
    warps: int
    stages: int = 1
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """What a launch says of it."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


def pieces(width: int) -> tuple[int, int]:
    """The two power-of-two pieces a row is held in: (head, tail); tail 0 for a power of two.

    Exact for the paper's widths, 1152 = 1024 + 128, 1024, 768 = 512 + 256 and 384 = 256 + 128; otherwise the tail is masked.
    """
    head = 1 << (width.bit_length() - 1)
    rest = width - head
    return head, 1 << (rest - 1).bit_length() if rest else 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def launch(
    kernel: Any, programs: int, tile: Tile, device: torch.device, *args: Any, **constants: Any
) -> None:
    """Runs ``programs`` programs of ``kernel`` on ``device``; none at all is allowed.

    The grid has one axis, so that its size is bounded by 2^31 - 1 and not by the 65,535 of the others.
    """
    if programs:
        with _on_device(device):
            kernel[(programs,)](*args, **constants, **tile.options)


def with_strides(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it: (tensor, strides ...), None for an absent one."""
    return None if tensor is None else (tensor, *tensor.stride())


def packed(vector: Tensor | None) -> Tensor | None:
    """A (B, D) or (D,) vector whose channels lie side by side; its samples may be strided. Only a strided one is copied."""
    if vector is None or vector.stride(-1) == 1:
        return vector
    return vector.contiguous()


def per_sample(vector: Tensor | None) -> tuple[Tensor, int] | None:
    """A packed (B, D) vector as the kernels take it: (vector, stride of the samples), None for an absent one."""
    return None if vector is None else (vector, vector.stride(0))
