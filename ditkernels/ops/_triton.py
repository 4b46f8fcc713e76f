"""What the Triton kernels of all ops share: when they can run, how a row is cut into pieces, how a kernel is launched.

Importing this module imports Triton, which takes longer than all else in this package, so nothing imports it before the Triton
backend is asked for. The import neither compiles a kernel nor initialises CUDA. Where Triton or the sources of the kernels are
missing it succeeds, and ``MISSING`` says why.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops._tile import Tile
from ditkernels.ops.choice import Op

MISSING: str | None = None
"""Why no kernel can run here, whatever the tensors; None: nothing is missing."""


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


try:
    import triton
    import triton.language as tl

    from ditkernels.ops import _launch
except Exception as error:  # noqa: BLE001 (a driver, a library or another version of Triton may raise anything)
    triton = tl = None
    MISSING = f"triton cannot be imported: {_told(error)}"


@contextmanager
def absent_if_broken() -> Iterator[None]:
    """Within this context a Triton whose import failed, whatever it raised, raises ImportError, which more callers forgive."""
    if triton is not None:
        yield
        return
    kept = {name: found for name, found in sys.modules.items() if name == "triton"}
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["triton"]
        sys.modules.update(kept)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384  # above 4096 the results are right, but the backward spills registers
OLDEST_CAPABILITY = (8, 0)


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; where something is missing, the function itself, which is then never called."""
    global MISSING
    if MISSING is not None:
        return function
    try:
        return triton.jit(function)
    except Exception as error:  # noqa: BLE001 (versions of Triton differ in what they raise where there is no source)
        MISSING = f"triton.jit, which reads sources, refuses {function.__module__}.{function.__name__}: {_told(error)}"
        return function


@jit
def _probe():  # type: ignore[no-untyped-def]
    pass


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when this file was imported."""


def _mend_interpreter() -> None:
    """Lets a kernel argument bound a loop: Triton 3.6's interpreter converts it to an index in a way that NumPy 2.4 rejects."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:  # another version
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _mend_interpreter()

# ---- When the kernels can run ----------------------------------------------------------------------------------------


@functools.cache
def _capability_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    got, need = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"the device has compute capability {got}, the kernels need {need}"


def cache_reason() -> str | None:
    """Why Triton cannot store what it compiles, or None if it can; without this a first launch would fail."""
    if "TRITON_CACHE_MANAGER" in os.environ:  # somebody else's way to store it
        return None
    folder = triton.knobs.cache.dir
    nearest = os.path.abspath(folder)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if folder and os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK):
        return None
    return f"Triton's cache, {folder or 'of no name'}, cannot be written to; TRITON_CACHE_DIR names another folder"


def device_reason(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of ``device``, or None if they can."""
    if MISSING is not None:
        return MISSING
    if device.type == "cuda":
        return None if INTERPRETED else _capability_reason(device) or cache_reason()
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


def pieces(width: int) -> tuple[int, int]:
    """Widths of the two power-of-two pieces that hold a row: (head, tail). The tail of a power of two is 0.

    They add up to the paper's widths exactly: 1152 = 1024 + 128, 1024, 768 = 512 + 256, 384 = 256 + 128. Others mask the tail.
    """
    head = 1 << (width.bit_length() - 1)
    rest = width - head
    return head, 1 << (rest - 1).bit_length() if rest else 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def remembered_by_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """``functools.lru_cache`` for functions of shapes. A compiler's symbolic sizes have no hash; their results are not cached."""
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
    """Runs ``programs`` programs of ``kernel`` on ``device``; with zero programs it does nothing. Every op launches through it.

    The grid uses its first axis only: that axis takes up to 2^31 - 1 programs, the other two 65,535.
    """
    if getattr(_tracing, "on", False):
        if programs:
            # Wrapped at each call, because torch._dynamo.reset() forgets the kernels that were wrapped before it.
            wrapped = torch.library.wrap_triton(_configured(kernel, tile))
            wrapped[(programs,)](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)
        return
    _launch.launch(kernel, programs, tile, device, args, constants)


_tracing = threading.local()


@functools.cache
def _configured(kernel: Any, tile: Tile) -> Any:
    """The kernel for a compiler's graph. Inductor drops ``maxnreg`` from a launch's options but not from an autotuner's config."""
    if tile.registers is None or torch.version.hip is not None:
        return kernel
    config = triton.Config({"maxnreg": tile.registers}, num_warps=tile.warps, num_stages=tile.stages)
    return triton.autotune([config], key=[])(kernel)


@contextmanager
def traced() -> Iterator[None]:
    """Within this context, each launch of this thread becomes a node of the graph that a compiler is tracing."""
    _tracing.on = True
    try:
        yield
    finally:
        _tracing.on = False


def with_strides(tensor: Tensor | None, axes: int = 3) -> tuple[Any, ...]:
    """The tensor followed by its strides, as a kernel takes them; for None, ``axes`` + 1 times None."""
    return (None,) * (axes + 1) if tensor is None else (tensor, *tensor.stride())


def packed(vector: Tensor | None) -> Tensor | None:
    """The vector with contiguous channels; only a strided vector is copied."""
    return None if vector is None else vector.contiguous()


def per_sample(vector: Tensor | None) -> tuple[Tensor | None, int | None]:
    """A (B, D) vector with contiguous channels and its batch stride, as a kernel takes them; (None, None) for None."""
    if vector is None:
        return None, None
    samples, channels = vector.stride()
    if channels != 1:
        vector = vector.contiguous()
        samples = vector.shape[1]
    return vector, samples
