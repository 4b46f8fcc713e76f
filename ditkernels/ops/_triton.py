"""What the Triton kernels of all ops share: when they can serve, how a row is cut into tiles, how they are launched.

Importing this file never compiles and never initialises CUDA; where Triton is missing it leaves a reason, not an ImportError.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ditkernels.ops import _launch

if TYPE_CHECKING:
    from ditkernels.ops.dispatch import Op

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

# ---- When the kernels can serve --------------------------------------------------------------------------------------


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


def refuse(op: Op, args: Sequence[Any]) -> str | None:
    """Why the kernels of ``op`` cannot take these arguments, or None if they can."""
    declaration = op.declaration
    reason = device_reason(next(value for value in args if isinstance(value, Tensor)).device)
    if reason is not None:
        return reason
    for dtype in declaration.dtypes(args):
        if dtype not in DTYPES:
            return f"{dtype} is not among the kernels' dtypes ({', '.join(map(str, DTYPES))})"
    width = declaration.size_of_row(args)
    if width > MAX_WIDTH:
        return f"a row of {width} channels does not fit in registers; the widest taken is {MAX_WIDTH}"
    return None


# ---- How a row is cut ------------------------------------------------------------------------------------------------


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


def remembered_by_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """``functools.lru_cache`` for what follows from shapes. Symbolic ones, a compiler's, have no hash; they are worked out anew."""
    known = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return known(*args)
        except TypeError:
            return function(*args)

    return call


# ---- Launch ----------------------------------------------------------------------------------------------------------


def launch(kernel: Any, programs: int, tile: Tile, device: torch.device, *args: Any, **constants: Any) -> None:
    """Runs ``programs`` programs of ``kernel`` on ``device``; none at all is allowed. Every launch of ours goes through here.

    The grid has one axis, so that its size is bounded by 2^31 - 1 and not by the 65,535 of the others.
    """
    if getattr(_tracing, "on", False):
        if programs:
            # Wrapped anew each time: torch._dynamo.reset() forgets what was wrapped.
            wrapped = torch.library.wrap_triton(_configured(kernel, tile))
            wrapped[(programs,)](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)
        return
    _launch.launch(kernel, programs, tile, device, args, constants)


_tracing = threading.local()


@functools.cache
def _configured(kernel: Any, tile: Tile) -> Any:
    """The kernel for a graph: Inductor loses ``maxnreg`` as an option of a launch, and keeps it in a configuration."""
    if tile.registers is None or torch.version.hip is not None:
        return kernel
    config = triton.Config({"maxnreg": tile.registers}, num_warps=tile.warps, num_stages=tile.stages)
    return triton.autotune([config], key=[])(kernel)


@contextmanager
def traced() -> Iterator[None]:
    """Makes each launch of this thread a node of the graph that a compiler is tracing."""
    _tracing.on = True
    try:
        yield
    finally:
        _tracing.on = False


def with_strides(tensor: Tensor | None, axes: int = 3) -> tuple[Any, ...]:
    """A tensor as a kernel takes it: the tensor and its strides, as many times None for an absent one of so many axes."""
    return (None,) * (axes + 1) if tensor is None else (tensor, *tensor.stride())


def packed(vector: Tensor | None) -> Tensor | None:
    """A vector whose channels lie side by side; only a strided one is copied."""
    return None if vector is None else vector.contiguous()


def per_sample(vector: Tensor | None) -> tuple[Tensor | None, int | None]:
    """A (B, D) vector as a kernel takes it: its channels side by side, and the stride of its samples; None twice for none."""
    if vector is None:
        return None, None
    samples, channels = vector.stride()
    if channels != 1:
        vector = vector.contiguous()
        samples = vector.shape[1]
    return vector, samples
