"""Launches Triton kernels in less host time than ``kernel[grid](...)`` takes.

Triton binds and specialises every argument again at each launch, and formats its options as a string. This module keeps the
compiled kernel of the first launch; a later launch that Triton would serve with the same code finds it in one dict and calls it.

The key of that dict holds everything that Triton compiles for:

- for each tensor, its dtype and whether its address is divisible by 16; on ROCm also whether its storage is below 2 GB;
- for each int, whether it is 1, whether it is divisible by 16, and whether it fits in int32, in int64 or only in uint64;
- the type of each argument, which distinguishes None, bool and float;
- constants, tile, device, driver, and Triton's settings ``debug`` and ``instrumentation_mode``.

The key also distinguishes what Triton's does not: a Parameter from a Tensor, tiles that differ only in rows, and orders of
constants. Each such difference costs one slow launch. Triton also checks at each launch that the globals a kernel reads are
unchanged. This module skips that check, because our kernels read only constants of their own modules.

Importing this module needs Triton; ``_triton`` does so, and says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.knobs import HookChain
from triton.runtime.driver import driver as drivers
from triton.runtime.jit import JITFunction

from ditkernels.ops._tile import Tile

Reader = Callable[..., tuple[Any, ...]]

_readers: dict[tuple[type, ...], Reader] = {}
_known: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def launch(kernel: Any, programs: int, tile: Tile, device: torch.device, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Runs ``programs`` programs of ``kernel`` on ``device``; with zero programs it does nothing.

    The grid uses its first axis only: that axis takes up to 2^31 - 1 programs, the other two 65,535.

    Args:
        kernel: a function decorated with ``triton.jit``.
        args: the kernel's arguments in order: tensors, ints, floats, bools and None, no tuples.
        constants: the kernel's constexpr parameters, which follow all others in its signature.
    """
    if not programs:
        return
    if type(kernel) is not JITFunction:  # Triton's interpreter
        _launch_plainly(kernel, programs, tile, args, constants)
        return
    driver = drivers.active
    current = driver.get_current_device()
    if device.index is not None and device.index != current and device.type == "cuda":
        with torch.cuda.device(device):
            launch(kernel, programs, tile, torch.device("cuda"), args, constants)  # the device that is now current
        return
    if _watched(kernel):
        _launch_plainly(kernel, programs, tile, args, constants)
        return
    key = _key(kernel, tile, driver, current, args, constants)
    known = _known.get(key)
    if known is None:
        compiled = _launch_plainly(kernel, programs, tile, args, constants)
        if isinstance(compiled, CompiledKernel):  # a hook may have prevented or deferred the compilation
            _known[key] = _plan(kernel, compiled, len(args), constants)
        return
    run, function, metadata, rest, _ = known
    stream = driver.get_current_stream(current)
    # The three None are the hooks and the metadata that they would receive: _watched found no hook.
    run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *rest)


def _launch_plainly(kernel: Any, programs: int, tile: Tile, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    return kernel[(programs,)](*args, **constants, **_options(tile))


def _options(tile: Tile) -> dict[str, Any]:
    options = dict(tile.options)
    if torch.version.hip is not None:
        del options["maxnreg"]  # ROCm does not know this option
    return options


def _watched(kernel: Any) -> bool:
    """Whether a hook wants to see each launch, for example a profiler's. Only Triton's own launch calls hooks."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and (type(hook) is not HookChain or hook.calls):
            return True
    return bool(kernel.pre_run_hooks) or runtime.add_stages_inspection_hook is not None


def _key(kernel: Any, tile: Tile, driver: Any, device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a launch's compiled kernel. It holds ``kernel.fn`` in place of ``kernel``, whose own hash is slow."""
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
    """Compiles a function that returns what Triton specialises on in arguments of these types; it runs at every launch."""
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
    """What a direct call needs. It keeps a reference to the compiled kernel, without which Triton would unload the code."""
    rest = kernel.params[given:]
    by_position = all(parameter.is_constexpr for parameter in rest)
    assert by_position, f"{kernel.fn.__name__} takes all but its constants by position"
    values = tuple(constants.get(parameter.name, parameter.default) for parameter in rest)
    return compiled.run, compiled.function, compiled.packed_metadata, values, compiled
