"""A Triton driver that compiles for a GPU that is not there and launches nothing: the host's part of a launch, alone.

With it ``kernel[grid](...)`` runs Triton's own Python from end to end, argument binding, cache look-up, hooks, on CPU tensors. Only
two things are replaced: loading the machine code, and the launcher, which counts its calls and calls the hooks that it is
given, as the real one does.

    with stub_driver.installed() as driver:
        kernel[(programs,)](*args, num_warps=4)
    driver.launches

Works with Triton 3.6 to 3.8. Kernels must not have been defined under TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

H100 = GPUTarget("cuda", 90, 32)
FIRST_DEVICE = 1000
MAX_SHARED = 227 * 1024  # bytes a program may have there


# Triton keeps compiled kernels by the device's number: each stub has one of its own, which no GPU has.
_devices = itertools.count(FIRST_DEVICE)


class Utils:
    """What Triton asks of a driver once for each compiled kernel."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, most threads of a program)."""
        self.loaded.append(name)
        return object(), len(self.loaded), 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED}


class Driver:
    """The driver itself.

    Attributes:
        launches: how often a kernel would have run.
        last: what the launcher got last, from the grid on; it keeps those tensors alive.
        kernels: that were compiled.
        device, stream: what is current; a test may set them.
    """

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = Utils()
        self.device = next(_devices)
        self.stream = self.launches = 0
        self.kernels: list[Any] = []
        self.last: tuple[Any, ...] = ()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.kernels.append(source.fn)

        def launch(
            x: int,
            y: int,
            z: int,
            stream: int,
            function: int,
            packed: Any,
            launch_metadata: Any,
            enter: Any,
            leave: Any,
            *args: Any,
        ) -> None:
            self.launches += 1
            self.last = (x, y, z, stream, function, packed, *args)
            if enter is not None:
                enter(launch_metadata)
            if leave is not None:
                leave(launch_metadata)

        return launch

    def unload(self) -> None:
        """Lets go of what was compiled, so that no later driver is asked to unload it."""
        for kernel in self.kernels:
            for cache, _, target, *_ in kernel.device_caches.values():
                for compiled in cache.values() if target is self.target else ():
                    compiled.module = None

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def installed(target: GPUTarget = H100) -> Iterator[Driver]:
    """Triton's driver is a stub inside."""
    config = triton.runtime.driver
    before, driver = config._active, Driver(target)
    config.set_active(driver)
    try:
        yield driver
    finally:
        driver.unload()
        config._active = before
