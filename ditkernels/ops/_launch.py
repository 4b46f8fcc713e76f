"""Launches Triton kernels for less of the host's time than ``kernel[grid](...)`` takes.

Triton binds and specialises every argument anew at each launch, and makes a string of its options. Here its first launch of a
kind is kept: a later launch of that kind finds the compiled kernel in one dict and calls it directly.

What makes two launches one kind is what Triton compiles for:

- of a tensor the dtype, and whether its address is divisible by 16; on ROCm also whether its storage is below 2 GB;
- of an int whether it is 1, whether it is divisible by 16, and whether it needs 32 bits, 64 bits or all 64 without a sign;
- of every argument its type, so None, bool and float are told apart;
- constants, tile, device, driver, and Triton's settings ``debug`` and ``instrumentation_mode``.

It is finer than Triton's own key in three points, each of which costs one slow launch: a Parameter is no Tensor, a tile of other
rows is another tile, and constants in another order are other constants. Triton also checks at each launch that no global a kernel
reads has changed; this one does not, since our kernels read constants of their files only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ditkernels.ops._triton import Tile

try:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.knobs import HookChain
    from triton.runtime.driver import driver as drivers
    from triton.runtime.jit import JITFunction
except ImportError:  # no kernel is then ever launched; _triton.MISSING says why
    pass

Reader = Callable[..., tuple[Any, ...]]

_readers: dict[tuple[type, ...], Reader] = {}
_known: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def launch(kernel: Any, programs: int, tile: Tile, device: torch.device, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Runs ``programs`` programs of ``kernel`` on ``device``; none at all is allowed.

    The grid has one axis, so that its size is bounded by 2^31 - 1 and not by the 65,535 of the others.

    Args:
        kernel: made by ``triton.jit``.
        args: the kernel's arguments in order: tensors, ints, floats, bools and None, no tuples.
        constants: the kernel's constexpr parameters, which come after all others.
    """
    if not programs:
        return
    if type(kernel) is not JITFunction:  # the interpreter's
        _launch_plainly(kernel, programs, tile, args, constants)
        return
    driver = drivers.active
    current = driver.get_current_device()
    if device.index is not None and device.index != current and device.type == "cuda":
        with torch.cuda.device(device):
            launch(kernel, programs, tile, torch.device("cuda"), args, constants)  # the current one
        return
    if _watched(kernel):
        _launch_plainly(kernel, programs, tile, args, constants)
        return
    key = _key(kernel, tile, driver, current, args, constants)
    known = _known.get(key)
    if known is None:
        compiled = _launch_plainly(kernel, programs, tile, args, constants)
        if isinstance(compiled, CompiledKernel):  # a hook may have prevented it, or put it off
            _known[key] = _plan(kernel, compiled, len(args), constants)
        return
    run, function, metadata, rest, _ = known
    stream = driver.get_current_stream(current)
    # Not watched, so neither hook is given, nor what they would be told.
    run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *rest)


def _launch_plainly(kernel: Any, programs: int, tile: Tile, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    return kernel[(programs,)](*args, **constants, **_options(tile))


def _options(tile: Tile) -> dict[str, Any]:
    options = dict(tile.options)
    if torch.version.hip is not None:
        del options["maxnreg"]  # unknown there
    return options


def _watched(kernel: Any) -> bool:
    """Whether somebody wants to see each launch, a profiler for example: Triton's own way calls the hooks."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and (type(hook) is not HookChain or hook.calls):
            return True
    return bool(kernel.pre_run_hooks) or runtime.add_stages_inspection_hook is not None


def _key(kernel: Any, tile: Tile, driver: Any, device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """What decides which compiled kernel a launch runs. ``kernel.fn`` stands for the kernel, whose own hash is slow."""
    kinds = tuple(map(type, args))
    reader = _readers.get(kinds) or _make_reader(kinds)
    return (
        kernel.fn,
        reader,
        reader(*args),
        tile,
        device,
        driver,
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
        *constants,
        *constants.values(),
    )


def _make_reader(kinds: tuple[type, ...]) -> Reader:
    """A function of arguments of these types that returns what Triton specialises on; compiled, since it runs at every launch."""
    reads = [read for i, kind in enumerate(kinds) for read in _reads(f"a{i}", kind)]
    parameters = ", ".join(f"a{i}" for i in range(len(kinds)))
    reader: Reader = eval(f"lambda {parameters}: ({' '.join(f'{read},' for read in reads)})")
    _readers[kinds] = reader
    return reader


def _reads(name: str, kind: type) -> list[str]:
    if issubclass(kind, Tensor):
        within = [f"{name}.untyped_storage().nbytes() < 2**31"] if torch.version.hip is not None else []
        return [f"{name}.dtype", f"{name}.data_ptr() & 15 == 0", *within]
    if issubclass(kind, int) and kind is not bool:
        width = f"0 if -(2**31) <= {name} < 2**31 else 1 if {name} < 2**63 else 2"
        return [f"{name} == 1", f"{name} & 15 == 0", width]
    if kind in (bool, float, type(None)):
        return []
    raise TypeError(f"a kernel takes tensors, numbers and None, got {kind.__name__}")


def _plan(kernel: Any, compiled: Any, given: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """What a direct call needs; the kernel itself is kept, since losing it unloads its code."""
    rest = kernel.params[given:]
    by_position = all(parameter.is_constexpr for parameter in rest)
    assert by_position, f"{kernel.fn.__name__} takes all but its constants by position"
    values = tuple(constants.get(parameter.name, parameter.default) for parameter in rest)
    return compiled.run, compiled.function, compiled.packed_metadata, values, compiled
